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
from nodes import NodeProcess, running, until
from tiny_model import write_model

TOKENS = 250
FAULT_AFTER = 40  # tokens


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
        family = [child for node in nodes for child in node.children()]
        yield asked, head, tail, model
    for process in family:  # what stands still does not notice the end of its node
        with suppress(psutil.NoSuchProcess):
            process.kill()


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
