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


class Answer:
    """A streamed answer, read beside the test. `gaps_s` lie between its pieces, `counts` says how many tokens each has:
    a character of several bytes is told with the last of its tokens.
    """

    def __init__(self, node: NodeProcess, model: Path, prompt: str, tokens: int) -> None:
        self.token_ids: list[int] = []
        self.gaps_s: list[float] = []
        self.counts: list[int] = []
        self.last: dict[str, Any] = {}
        self._url = node.url + "/generate"
        messages = [{"role": "user", "content": prompt}]
        self._body = {"model": str(model), "messages": messages, "temperature": 0, "max_tokens": tokens}
        self._thread = Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait(self) -> list[int]:
        """All its tokens, if it came to its end."""
        self._thread.join(120)
        assert self.last.get("type") == "GenerationFinished", self.last
        return self.token_ids

    def longest_wait_s(self) -> float:
        """For one token, once answering has begun: those that were told together with another took what most do."""
        gaps = list(zip(self.gaps_s, self.counts, strict=True))[1:]
        usual_s = median(gap_s for gap_s, count in gaps if count == 1)
        return max(gap_s - (count - 1) * usual_s for gap_s, count in gaps)

    def _read(self) -> None:
        told_s = time.monotonic()
        with httpx.stream("POST", self._url, json=self._body, timeout=120) as response:
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                self.last = json.loads(line.removeprefix("data: "))
                if self.last["type"] == "TextGenerated":
                    self.token_ids += self.last["token_ids"]
                    self.counts.append(len(self.last["token_ids"]))
                    self.gaps_s.append(time.monotonic() - told_s)
                    told_s = time.monotonic()


def long_prompt_of(node: NodeProcess, model: Path, tokens: int) -> tuple[str, list[int]]:
    """One whose answer does not end by itself within so many tokens, and that answer."""
    for number in range(20):
        answer = Answer(node, model, f"Tell me {number}.", tokens)
        if len(answer.wait()) == tokens:
            return f"Tell me {number}.", answer.token_ids
    pytest.fail("all answers are short")
