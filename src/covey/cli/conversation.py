"""A conversation at a terminal: questions typed with editing and a history, and commands that begin with a slash."""

import contextlib
import importlib
import re
from typing import Any, Final

from covey.cli.chat import ask, cut_short, figures, opening, write
from covey.cli.client import CliError, NodeClient, WrongRequestError
from covey.cli.console import err
from covey.cli.naming import with_short_ids

HINT: Final = "/help lists what can be done, Ctrl-C stops an answer, Ctrl-D leaves."
HELP: Final = """\
/clear        forget what was said
/system TEXT  what the model is told first, from now on; without TEXT: what its file says
/exit         leave, as Ctrl-D does
/help         this list
Ctrl-C stops an answer. The arrow keys move in the line, and bring back earlier ones."""
WAY_OUT: Final = "/clear forgets what was said"
COMMAND: Final = re.compile(r"(/[a-z]+)(?:\s+(.*))?", re.DOTALL)  # "/etc/hosts, what is it?" is a question


class Conversation:
    """All that was said goes with each question, unless it is forgotten."""

    def __init__(self, node: NodeClient, model: str, options: dict[str, Any], system: str | None = None) -> None:
        self._node = node
        self._model = model
        self._options = options
        self._system = system
        self._said: list[dict[str, str]] = []  # questions and answers, in turn

    def hold(self) -> None:
        """Until the person leaves."""
        with contextlib.suppress(ImportError):  # where there is none, lines are typed as the terminal has it
            importlib.import_module("readline")  # from then on `input` edits
        err.print(f"{self._model}. {HINT}", style="dim", soft_wrap=True)
        while (line := _typed()) is not None:
            command = COMMAND.fullmatch(line)
            if command and command[1] == "/exit":
                return
            if command:
                self._obey(command[1], command[2] or "")
            elif line:
                self._answer(line)

    def _obey(self, command: str, text: str) -> None:
        match command:
            case "/help":
                told = HELP
            case "/clear":
                self._said.clear()
                told = "What was said is forgotten."
            case "/system":
                self._system = text or None
                told = "The model is told that first." if text else "The model is told first what its file says."
            case _:
                told = f"There is no command {command}; /help lists those there are."
        err.print(told, style="dim", markup=False, soft_wrap=True)

    def _answer(self, question: str) -> None:
        """What was interrupted is kept as far as it came; what failed was never asked."""
        answer = ""

        def show(text: str) -> None:
            nonlocal answer
            answer += text
            write(text)

        asked = [*self._said, {"role": "user", "content": question}]
        body = {"model": self._model, "messages": [*opening(self._system), *asked], **self._options}
        try:
            done = ask(self._node, body, show)
            write("\n")
            err.print(figures(done), style="dim", soft_wrap=True)
            cut_short(done, self._options, WAY_OUT)
        except KeyboardInterrupt:
            write("\n")
            err.print("stopped", style="dim")
        except CliError as error:
            write("\n" if answer else "")
            hint = f" {WAY_OUT}." if self._said and isinstance(error, WrongRequestError) else ""  # it may be too long
            err.print(f"{with_short_ids(str(error))}{hint}", style="red", markup=False, soft_wrap=True)
            return
        if answer:
            self._said = [*asked, {"role": "assistant", "content": answer}]


def _typed() -> str | None:
    """A line; None at the end of the input."""
    while True:
        try:
            return input("> ").strip()
        except KeyboardInterrupt:
            write("\n")
            err.print("Ctrl-D or /exit leaves.", style="dim")
        except EOFError:
            write("\n")
            return None
