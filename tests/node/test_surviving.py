"""Faults while an answer streams, with real processes: no token is lost, doubled or changed, and nobody waits for ever.

The fake engine's next token follows from all tokens before it, so an answer that went on elsewhere must be the very
same text as one that nothing disturbed.
"""

import signal
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from answers import Answer, long_prompt_of
from nodes import NodeProcess, runner_of, running, stop_all, until
from tiny_model import write_model

TOKENS = 250
FAULT_AFTER = 40  # tokens


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
        family = [child for node in nodes for child in node.children()]
        yield asked, head, tail, model
    for process in family:  # what stands still does not notice the end of its node
        with suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.mark.timed
def test_an_answer_goes_on_after_the_node_that_was_asked_has_slept(tmp_path: Path) -> None:
    """The lid is closed on the laptop where somebody asked. It closes no connection, so the head just hears nothing: it
    ends the request and gives its slot to others. After waking, the answer goes on where it stopped.
    """
    model = write_model(tmp_path / "model.gguf", layers=4)
    with running(tmp_path, "fast", step_delay_ms="0") as (fast,):
        fast.post("/place_instance", {"model_id": str(model)})
        until(lambda: list(fast.runners().values()) == ["Ready"])
        prompt, undisturbed = long_prompt_of(fast, model, TOKENS)
    with running(tmp_path, "asked", "head", step_delay_ms="70") as (asked, head):  # so that it would run for 17 s
        until(lambda: len(asked.visibility()) == len(head.visibility()) == 2)
        asked.post("/place_instance", {"model_id": str(model), "node_ids": [head.node_id]})
        until(lambda: list(asked.runners().values()) == ["Ready"])
        answer = Answer(asked, model, prompt, TOKENS)
        until(lambda: len(answer.token_ids) > FAULT_AFTER)
        family = [asked.process, *asked.children()]
        stop_all(asked)
        try:
            freed_s = until(lambda: requests_running(head) == 0)
        finally:
            for process in family:
                process.send_signal(signal.SIGCONT)
        assert 8 < freed_s < 14
        assert answer.wait() == undisturbed
        print(
            f"the asking node sleeps: its slot is free after {freed_s:.1f} s, {max(answer.gaps_s):.2f} s with no token"
        )
        until(lambda: requests_running(head) == 0)


def requests_running(node: NodeProcess) -> int:
    reports = [each["report"] for each in node.get("/cluster")["members"] if each["node_id"] == node.node_id]
    return sum(runner["requests_running"] for report in reports for runner in report["runners"])


@pytest.mark.parametrize("stage", ["head", "last stage"])
@pytest.mark.parametrize("fault", FAULTS)
def test_an_answer_goes_on(three: tuple[NodeProcess, NodeProcess, NodeProcess, Path], stage: str, fault: str) -> None:
    asked, head, tail, model = three
    prompt, undisturbed = long_prompt_of(asked, model, TOKENS)
    answer = Answer(asked, model, prompt, TOKENS)
    until(lambda: len(answer.token_ids) > FAULT_AFTER)
    FAULTS[fault](head if stage == "head" else tail)
    assert answer.wait() == undisturbed
    print(f"the {stage}'s {fault}: {max(answer.gaps_s):.2f} s without a token")
