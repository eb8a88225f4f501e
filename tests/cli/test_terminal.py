"""The command as a process: pipes that end early, prompts from a pipe, and a conversation at a real terminal."""

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from covey.cli.chat import Answer, figures
from covey.cli.console import harmless
from covey.schema.generation import FinishReason, GenerationFailed, GenerationFinished, Timings, Usage
from tests.api.fake_backend import ANSWER
from tests.cli.served_node import ServedNode

COVEY = [sys.executable, "-m", "covey.cli"]
WAIT_S = 30
KEYSTROKE_S = 0.2  # between keys: a signal while Python handles the last one is seen with the next key only


def environment(node: ServedNode, **more: str) -> dict[str, str]:
    return {**os.environ, "COVEY_URL": node.url, **more}


def covey(node: ServedNode, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COVEY, *arguments],
        env=environment(node),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
        **options,
    )


def test_a_prompt_through_a_pipe(node: ServedNode) -> None:
    done = covey(node, "run", "Tiny-Chat", input="What is\na partridge?\n")
    assert (done.returncode, done.stdout) == (0, "Hello, world – 🐦\n")
    assert node.backend.requests[0].messages[0].content == "What is\na partridge?"


def test_a_file_after_the_question(node: ServedNode) -> None:
    done = covey(node, "run", "Tiny-Chat", "Sum", "this up:", input="\nIt rained.\n  Then it did not.\n\n")
    assert (done.returncode, done.stdout) == (0, "Hello, world – 🐦\n")
    assert node.backend.requests[0].messages[0].content == "Sum this up:\n\nIt rained.\n  Then it did not."


@pytest.mark.parametrize("is_closed", [True, False])
def test_a_question_without_a_file(node: ServedNode, *, is_closed: bool) -> None:
    shell = f'"$@" {"<&-" if is_closed else "</dev/null"}'
    done = subprocess.run(
        ["/bin/sh", "-c", shell, "sh", *COVEY, "run", "Tiny-Chat", "Hi"],
        env=environment(node),
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 0
    assert node.backend.requests[0].messages[0].content == "Hi"


def test_what_is_no_text_is_no_prompt(node: ServedNode) -> None:
    done = subprocess.run(
        [*COVEY, "run", "Tiny-Chat", "What is it?"],
        env=environment(node, PYTHONUTF8="1"),
        input=b"\x89PNG\xff",
        capture_output=True,
        timeout=WAIT_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, b"Standard input is no text: it holds bytes that are not UTF-8.\n")


def test_an_empty_pipe_is_no_prompt(node: ServedNode) -> None:
    done = covey(node, "run", "Tiny-Chat", input="")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "There is no prompt: standard input is empty.\n"


NOTE = "Reading standard input, which goes below the question; Ctrl-D ends it, `< /dev/null` leaves it out.\n"


def test_a_pipe_that_stays_open_is_told_of(node: ServedNode) -> None:
    with asked(node.url) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        readable, _, _ = select.select([process.stderr], [], [], WAIT_S)
        assert readable
        output, errors = process.communicate("It rained.", timeout=WAIT_S)
    assert (process.returncode, output, errors) == (0, "Hello, world – 🐦\n", NOTE)
    assert node.backend.requests[0].messages[0].content == "Sum this up:\n\nIt rained."


def test_a_node_that_is_away_is_told_of_before_standard_input_ends() -> None:
    with asked("http://127.0.0.1:1") as process:
        assert process.wait(WAIT_S) == 1
        assert process.stderr is not None
        assert process.stderr.read().startswith("No node answers at http://127.0.0.1:1.")


@contextmanager
def asked(url: str) -> Iterator[subprocess.Popen[str]]:
    """With a pipe that nobody has closed."""
    command, pipe = [*COVEY, "run", "Tiny-Chat", "Sum this up:"], subprocess.PIPE
    environment = {**os.environ, "COVEY_URL": url}
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_reader_that_leaves_early_is_no_error_to_talk_about(node: ServedNode) -> None:
    process = subprocess.Popen([*COVEY, "nodes"], env=environment(node), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=WAIT_S)
    assert errors == b""


def test_tokens_from_the_cache_make_no_speed() -> None:
    finished = GenerationFinished(FinishReason.STOP, Usage(100, 11, 80), Timings(0.0, 100.0, 1000.0))
    answer = Answer(prompt_tokens=100, first_token_seconds=0.1, finished=finished)
    assert figures(answer) == ("10.0 tokens/s (11), prompt 200/s (100, 80 cached), first in 0.10 s")


def test_figures_fit_a_line() -> None:
    finished = GenerationFinished(FinishReason.STOP, Usage(131072, 8192, 131000), Timings(0.0, 5.0, 50000.0))
    assert len(figures(Answer(first_token_seconds=12.345, finished=finished))) <= 80


@pytest.mark.parametrize(
    ("options", "reason"), [(("--max-tokens", "4"), "; --max-tokens for more"), ((), ": the context is full")]
)
def test_an_answer_that_was_cut_is_told_of(node: ServedNode, options: tuple[str, ...], reason: str) -> None:
    cut = GenerationFinished(FinishReason.LENGTH, Usage(7, 4), Timings(1.0, 35.0, 60.0))
    node.backend.events = (*ANSWER[:-1], cut)
    done = covey(node, "run", "Tiny-Chat", "Hi", *options)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hello, world – 🐦\n", f"(cut after 4 tokens{reason})\n")


def test_a_model_does_not_move_the_cursor() -> None:
    assert (
        harmless("red \x1b[31m, bell \x07, title \x9d0;x, line\n\ttab") == "red �[31m, bell �, title �0;x, line\n\ttab"
    )


# ---- a conversation ----


@dataclass
class Terminal:
    """The person's side of a pseudo-terminal."""

    process: subprocess.Popen[bytes]
    descriptor: int
    shown: str = ""

    def wait_for(self, text: str) -> None:
        """Reads until `text` has been shown, and forgets what was shown up to its end."""
        self.read_until(text)
        self.shown = self.shown.partition(text)[2]

    def read_until(self, text: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while text not in self.shown:
            readable, _, _ = select.select([self.descriptor], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, f"{text!r} is not in {self.shown!r}"
            self.shown += os.read(self.descriptor, 4096).decode(errors="replace")

    def press(self, keys: str) -> None:
        os.write(self.descriptor, keys.encode())

    def type(self, keys: str) -> None:
        """At the prompt: what comes earlier is not edited."""
        self.wait_for("> ")
        self.press(keys)


@contextmanager
def conversation(node: ServedNode, **more: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COVEY, "run", "Tiny-Chat"],
        env=environment(node, TERM="xterm-256color", **more),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=own_terminal,  # noqa: PLW1509 - Ctrl-C reaches only whoever has the terminal
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


CONTROL_C, CONTROL_D = "\x03", "\x04"


def test_a_conversation_remembers_what_was_said(node: ServedNode) -> None:
    with conversation(node) as terminal:
        terminal.type("Hi\n")
        terminal.wait_for("world – 🐦")
        terminal.wait_for("tokens/s")
        terminal.type("And you?\n")
        terminal.wait_for("world – 🐦")
        terminal.wait_for("tokens/s")
        terminal.type(CONTROL_D)
    said = [(message.role, message.content) for message in node.backend.requests[1].messages]
    assert said == [("user", "Hi"), ("assistant", "Hello, world – 🐦"), ("user", "And you?")]


def test_a_conversation_that_fills_the_context_says_the_way_out(node: ServedNode) -> None:
    cut = GenerationFinished(FinishReason.LENGTH, Usage(7, 4), Timings(1.0, 35.0, 60.0))
    full = "The prompt has 9 tokens, and the context of Tiny-Chat holds 8 with the answer. Shorten the prompt."
    with conversation(node) as terminal:
        node.backend.events = [GenerationFailed(full, 400)]
        terminal.type("A first question that is too long\n")
        terminal.wait_for("Shorten the prompt.")
        terminal.read_until("> ")
        assert "/clear" not in terminal.shown
        node.backend.events = (*ANSWER[:-1], cut)
        terminal.type("Hi\n")
        terminal.wait_for("(cut after 4 tokens: the context is full; /clear forgets what was said)")
        node.backend.events = [GenerationFailed(full, 400)]
        terminal.type("And?\n")
        terminal.wait_for("Shorten the prompt. /clear forgets what was said.")
        terminal.type(CONTROL_D)


def test_a_refused_question_leaves_no_empty_line(node: ServedNode) -> None:
    node.backend.events = [GenerationFailed("The prompt is too long.", 400)]
    done = covey(node, "run", "Tiny-Chat", "Hi")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "The prompt is too long.\n")


def test_an_error_begins_a_line(node: ServedNode) -> None:
    node.backend.events = (*ANSWER[:3], GenerationFailed("The node berta is lost."))
    with conversation(node, NO_COLOR="1") as terminal:
        terminal.type("Hi\n")
        terminal.wait_for("Hello\r\nThe node berta is lost.")
        terminal.type(CONTROL_D)


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(node: ServedNode) -> None:
    node.backend.hang_after = 3
    with conversation(node) as terminal:
        terminal.type("Hi\n")
        terminal.wait_for("Hello")
        terminal.press(CONTROL_C)
        terminal.wait_for("stopped")
        node.backend.hang_after = None
        terminal.type("Go on.\n")
        terminal.wait_for("world – 🐦")
        terminal.wait_for("tokens/s")
        terminal.type(CONTROL_D)
    assert node.backend.closed == 2
    assert [message.content for message in node.backend.requests[1].messages] == ["Hi", "Hello", "Go on."]


@pytest.mark.parametrize("no_color", [True, False])
def test_colour_only_where_it_is_wanted(node: ServedNode, *, no_color: bool) -> None:
    node.backend.events = [GenerationFailed("The node berta is lost.")]
    with conversation(node, **({"NO_COLOR": "1"} if no_color else {})) as terminal:
        terminal.type("Hi\n")
        terminal.wait_for("Hi\r\n")
        terminal.read_until("berta is lost.")
        assert ("\x1b[31m" in terminal.shown) is not no_color
        terminal.type(CONTROL_D)


def said(node: ServedNode, number: int) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in node.backend.requests[number].messages]


def test_commands_of_a_conversation(node: ServedNode) -> None:
    with conversation(node) as terminal:
        terminal.type("/help\n")
        terminal.wait_for("/system TEXT")
        terminal.type("Hi\n")
        terminal.wait_for("first in")
        terminal.type("/system Be brief.\n")
        terminal.wait_for("told that first")
        terminal.type("And you?\n")
        terminal.wait_for("first in")
        terminal.type("/clear\n")
        terminal.wait_for("forgotten")
        terminal.type("/dance\n")
        terminal.wait_for("There is no command /dance")
        terminal.type("/etc/hosts is what?\n")
        terminal.wait_for("first in")
        terminal.type("/system\n")
        terminal.wait_for("its file says")
        terminal.type("Bye\n")
        terminal.wait_for("first in")
        terminal.type("/exit\n")
    answer = ("assistant", "Hello, world – 🐦")
    brief = ("system", "Be brief.")
    assert said(node, 0) == [("user", "Hi")]
    assert said(node, 1) == [brief, ("user", "Hi"), answer, ("user", "And you?")]
    assert said(node, 2) == [brief, ("user", "/etc/hosts is what?")]
    assert said(node, 3) == [("user", "/etc/hosts is what?"), answer, ("user", "Bye")]


def test_a_line_can_be_edited_and_brought_back(node: ServedNode) -> None:
    up, left, backspace = "\x1b[A", "\x1b[D", "\x7f"
    with conversation(node) as terminal:
        terminal.type(f"Hxo{left}{backspace}ell\n")
        terminal.wait_for("first in")
        terminal.type(f"{up}!\n")
        terminal.wait_for("first in")
        terminal.type(CONTROL_D)
    assert [said(node, number)[-1][1] for number in (0, 1)] == ["Hello", "Hello!"]


def test_ctrl_c_at_the_prompt_leaves_only_the_line(node: ServedNode) -> None:
    with conversation(node) as terminal:
        terminal.type("never mind")
        terminal.wait_for("never mind")
        time.sleep(KEYSTROKE_S)
        terminal.press(CONTROL_C)
        terminal.wait_for("/exit leaves")
        terminal.type("Hi\n")
        terminal.wait_for("first in")
        terminal.type(CONTROL_D)
    assert said(node, 0) == [("user", "Hi")]
