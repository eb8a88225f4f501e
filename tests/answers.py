"""Answers that stream while a test does something else."""

import json
import time
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any

import httpx
import pytest
from nodes import NodeProcess
from up import Node


class Answer:
    """A streamed answer, read beside the test. `gaps_s` lie between its pieces, which came at `told_s`; `counts` says
    how many tokens each has: a character of several bytes is told with the last of its tokens. `read_again` has an
    entry for each time that a head began with it: how many tokens it read first. `broken` says how its connection
    ended, if not by its own end.
    """

    def __init__(self, node: NodeProcess | Node, model: Path, prompt: str, tokens: int, silence_s: float = 120) -> None:
        self.prompt = prompt
        self.token_ids: list[int] = []
        self.gaps_s: list[float] = []
        self.told_s: list[float] = []  # by the monotonic clock
        self.counts: list[int] = []
        self.read_again: list[int] = []
        self.last: dict[str, Any] = {}
        self.broken = ""
        self._node, self._silence_s = node, silence_s
        messages = [{"role": "user", "content": prompt}]
        self._body = {"model": str(model), "messages": messages, "temperature": 0, "max_tokens": tokens}
        self._thread = Thread(target=self._read, daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> list[int]:
        """All its tokens, if it came to its end."""
        self._thread.join(120)
        assert self.last.get("type") == "GenerationFinished", (self.last, self.broken)
        return self.token_ids

    def longest_wait_s(self) -> float:
        """For one token, once answering has begun: those that were told together with another took what most do."""
        gaps = list(zip(self.gaps_s, self.counts, strict=True))[1:]
        usual_s = median(gap_s for gap_s, count in gaps if count == 1)
        return max(gap_s - (count - 1) * usual_s for gap_s, count in gaps)

    def longest_wait_after_s(self, moment_s: float) -> float | None:
        """For a piece that came after that moment, counted from it at the earliest; None if none came."""
        ends = [told_s for told_s in self.told_s if told_s > moment_s]
        return max((end - start for start, end in zip([moment_s, *ends], ends, strict=False)), default=None)

    def _read(self) -> None:
        begun_s = time.monotonic()
        try:
            with self._node.posting("/generate", self._body, self._silence_s) as response:
                if not response.is_success:
                    self.last = {"type": "Refused", "message": response.read().decode()}
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        begun_s = self._take(json.loads(line.removeprefix("data: ")), begun_s)
        except httpx.HTTPError as error:
            self.broken = repr(error)

    def _take(self, event: dict[str, Any], before_s: float) -> float:
        """Returns when the last piece came."""
        self.last = event
        if event["type"] == "PrefillProgressed" and event["total_tokens"] not in self.read_again:
            self.read_again.append(event["total_tokens"])
        if event["type"] != "TextGenerated":
            return before_s
        now_s = time.monotonic()
        self.token_ids += event["token_ids"]
        self.counts.append(len(event["token_ids"]))
        self.gaps_s.append(now_s - before_s)
        self.told_s.append(now_s)
        return now_s


def long_prompt_of(node: NodeProcess, model: Path, tokens: int) -> tuple[str, list[int]]:
    """One whose answer does not end by itself within so many tokens, and that answer."""
    for number in range(20):
        answer = Answer(node, model, f"Tell me {number}.", tokens)
        if len(answer.wait()) == tokens:
            return f"Tell me {number}.", answer.token_ids
    pytest.fail("all answers are short")
