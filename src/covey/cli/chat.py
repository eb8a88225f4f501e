"""Prompts in, text out: one answer, and what is told of it."""

import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from msgspec import Struct

from covey.cli.client import CliError, NodeClient, refused
from covey.cli.console import err, harmless
from covey.schema.generation import (
    FinishReason,
    GenerationFailed,
    GenerationFinished,
    GenerationStarted,
    TextGenerated,
)

INTERRUPTED_EXIT: Final = 130
SILENT_SECONDS_MAX: Final = 1.0  # what a program writes or a file holds is here by then, or soon
WAITS_FOR_INPUT: Final = (
    "Reading standard input, which goes below the question; Ctrl-D ends it, `< /dev/null` leaves it out."
)


class Answer(Struct):
    """What came back. `finished` is None while it runs, or when it was interrupted."""

    text: str = ""
    token_ids: list[int] = []
    prompt_tokens: int = 0
    first_token_seconds: float = 0.0
    finished: GenerationFinished | None = None

    @property
    def prefill_tokens_per_second(self) -> float:
        """Of the tokens that were computed; those in the cache took no time."""
        assert self.finished is not None, "an answer that has ended"
        usage = self.finished.usage
        return (usage.prompt_tokens - usage.cached_tokens) / max(self.finished.timings.prefill_ms / 1000, 1e-6)

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first (which prefill gives) by the time that they took."""
        assert self.finished is not None, "an answer that has ended"
        count = self.finished.usage.completion_tokens - 1
        return max(count, 0) / max(self.finished.timings.decode_ms / 1000, 1e-6)


def ask(node: NodeClient, body: dict[str, Any], show: Callable[[str], None]) -> Answer:
    """Streams one answer into `show`. Raises `CliError` with the reason if it could not be completed."""
    answer, started = Answer(), time.monotonic()
    for event in node.generate(body):
        match event:
            case GenerationStarted():
                answer.prompt_tokens = event.prompt_tokens
            case TextGenerated():
                answer.first_token_seconds = answer.first_token_seconds or time.monotonic() - started
                answer.text += event.text
                answer.token_ids += event.token_ids
                show(event.text)
            case GenerationFinished():
                answer.finished = event
            case GenerationFailed():
                raise refused(event.message, event.status)
            case _:
                pass
    if answer.finished is None:
        raise CliError("The answer broke off before its end: the connection to the node was lost.")
    return answer


def write(text: str) -> None:
    """Straight to standard output: an answer is not markup."""
    sys.stdout.write(harmless(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def figures(answer: Answer) -> str:
    """How fast it was, in one line of a terminal: 80 columns."""
    assert answer.finished is not None, "an answer that has ended"
    usage = answer.finished.usage
    cached = f", {usage.cached_tokens} cached" if usage.cached_tokens else ""
    return (
        f"{answer.decode_tokens_per_second:.1f} tokens/s ({usage.completion_tokens}), prompt "
        f"{answer.prefill_tokens_per_second:.0f}/s ({usage.prompt_tokens}{cached}), first in "
        f"{answer.first_token_seconds:.2f} s"
    )


def cut_short(answer: Answer, options: dict[str, Any], way_out: str = "") -> None:
    """Says so where the answer did not come to its own end: on standard error, where it disturbs no pipe.

    `way_out` of a full context, if there is one.
    """
    assert answer.finished is not None, "an answer that has ended"
    if answer.finished.reason is not FinishReason.LENGTH:
        return
    count = answer.finished.usage.completion_tokens
    is_asked = count >= options.get("max_tokens", math.inf)
    reason = "; --max-tokens for more" if is_asked else f": the context is full{way_out and '; '}{way_out}"
    err.print(f"(cut after {count} token{'s' * (count > 1)}{reason})", style="dim")


def question(words: Sequence[str]) -> str:
    """What is asked: the words of the command line, and below them what a pipe or a file brings. Empty: a person is at
    the terminal, and will say. Raises `CliError`.
    """
    text, is_typed = " ".join(words), sys.stdin is not None and sys.stdin.isatty()
    if sys.stdin is not None and not is_typed:
        piped = _piped(WAITS_FOR_INPUT if text else "")
        text = "\n\n".join(part for part in (text, piped) if part)
    if not text and not is_typed:
        raise CliError("There is no prompt: standard input is empty.")
    return text


def _piped(note: str) -> str:
    """All that comes. Where nothing does for a while, `note` is told: a pipe that was inherited may never end."""
    waits = threading.Timer(SILENT_SECONDS_MAX, partial(err.print, note, style="dim", soft_wrap=True))
    if note:
        waits.start()
    try:
        first = sys.stdin.buffer.read(1)
    finally:
        waits.cancel()
    try:
        return (first + sys.stdin.buffer.read()).decode().strip()  # whatever the locale
    except UnicodeDecodeError:
        raise CliError("Standard input is no text: it holds bytes that are not UTF-8.") from None


def opening(system: str | None) -> list[dict[str, str]]:
    """The messages before a person's first; none leaves the word to the model's template."""
    return [] if system is None else [{"role": "system", "content": system}]


def single(node: NodeClient, model: str, prompt: str, options: dict[str, Any], system: str | None = None) -> None:
    """One question, one answer; the figures go to standard error, where they disturb no pipe."""
    messages, shown = [*opening(system), {"role": "user", "content": prompt}], ""

    def show(text: str) -> None:
        nonlocal shown
        shown += text
        write(text)

    try:
        answer = ask(node, {"model": model, "messages": messages, **options}, show)
    finally:
        write("\n" if shown else "")  # what comes next, be it an error, begins a line
    if err.is_terminal:
        err.print(figures(answer), style="dim", soft_wrap=True)
    cut_short(answer, options)
