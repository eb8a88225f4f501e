"""Faults while an answer streams, with real processes: no token is lost, doubled or changed, and nobody waits for ever.

The fake engine's next token follows from all tokens before it, so an answer that went on elsewhere must be the very
same text as one that nothing disturbed.
"""

import json
import signal
import time
from collections.abc import Callable, Generator
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import psutil
import pytest
from nodes import NodeProcess, running, until
from tiny_model import write_model

TOKENS = 250
FAULT_AFTER = 40  # tokens


class Answer:
    """A streamed answer, read beside the test. `gaps_s` lie between its tokens."""

    def __init__(self, node: NodeProcess, model: Path, prompt: str) -> None:
        self.token_ids: list[int] = []
        self.gaps_s: list[float] = []
        self.last: dict[str, Any] = {}
        self._url = node.url + "/generate"
        messages = [{"role": "user", "content": prompt}]
        self._body = {"model": str(model), "messages": messages, "temperature": 0, "max_tokens": TOKENS}
        self._thread = Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait(self) -> list[int]:
        """All its tokens, if it came to its end."""
        self._thread.join(120)
        assert self.last.get("type") == "GenerationFinished", self.last
        return self.token_ids

    def _read(self) -> None:
        told_s = time.monotonic()
        with httpx.stream("POST", self._url, json=self._body, timeout=120) as response:
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                self.last = json.loads(line.removeprefix("data: "))
                if self.last["type"] == "TextGenerated":
                    self.token_ids += self.last["token_ids"]
                    self.gaps_s.append(time.monotonic() - told_s)
                    told_s = time.monotonic()


def long_prompt_of(node: NodeProcess, model: Path) -> tuple[str, list[int]]:
    """One whose answer does not end by itself, and that answer."""
    for number in range(20):
        answer = Answer(node, model, f"Tell me {number}.")
        if len(answer.wait()) == TOKENS:
            return f"Tell me {number}.", answer.token_ids
    pytest.fail("all answers are short")


def runner_of(node: NodeProcess) -> psutil.Process:
    [runner] = [each for each in node.children() if "covey.engine" in " ".join(each.cmdline())]
    return runner


def stop_all(node: NodeProcess) -> None:
    """As when the lid is closed: the node, its runner and its mesh process."""
    for process in [node.process, *node.children()]:
        process.send_signal(signal.SIGSTOP)


FAULTS: dict[str, Callable[[NodeProcess], None]] = {
    "runner is killed": lambda node: runner_of(node).kill(),
    "node is killed": lambda node: node.process.kill(),
    "machine stands still": stop_all,
}


@pytest.fixture
def three(tmp_path: Path) -> Generator[tuple[NodeProcess, NodeProcess, NodeProcess, Path]]:
    """Who is asked, and the two that hold the model: the head and the last stage."""
    model = write_model(tmp_path / "model.gguf", layers=4)
    with running(tmp_path, "a", "b", "c") as nodes:
        asked = nodes[0]
        until(lambda: all(len(node.visibility()) == len(nodes) for node in nodes))
        holders = [node.node_id for node in nodes[1:]]
        asked.post("/place_instance", {"model_id": str(model), "min_nodes": 2, "node_ids": holders})
        until(lambda: list(asked.runners().values()) == ["Ready"] * 2)
        [instance] = asked.get("/cluster")["instances"]
        by_id = {node.node_id: node for node in nodes}
        head, tail = (by_id[stage["node_id"]] for stage in instance["stages"])
        yield asked, head, tail, model


@pytest.mark.parametrize("stage", ["head", "last stage"])
@pytest.mark.parametrize("fault", FAULTS)
def test_an_answer_goes_on(three: tuple[NodeProcess, NodeProcess, NodeProcess, Path], stage: str, fault: str) -> None:
    asked, head, tail, model = three
    prompt, undisturbed = long_prompt_of(asked, model)
    answer = Answer(asked, model, prompt)
    until(lambda: len(answer.token_ids) > FAULT_AFTER)
    FAULTS[fault](head if stage == "head" else tail)
    assert answer.wait() == undisturbed
    print(f"the {stage}'s {fault}: {max(answer.gaps_s):.2f} s without a token")
