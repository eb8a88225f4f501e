"""Real nodes whose runners share each layer: they answer as one does, and an answer goes on whichever of them is lost.

The fake engine's next token follows from all tokens before it, and its ranks must add up their parts to know it.
"""

import signal
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from answers import Answer, long_prompt_of
from nodes import NodeProcess, runner_of, running, stop_all, until
from tiny_model import write_model
from typer.testing import CliRunner

from covey.cli.main import app

TOKENS = 250
FAULT_AFTER = 40  # tokens


def place(node: NodeProcess, model: Path, rank_count: int, **fields: Any) -> list[dict[str, Any]]:
    """Its runners, once all are ready."""
    node.post("/place_instance", {"model_id": str(model), "rank_count": rank_count, **fields})
    until(lambda: set(node.runners().values()) == {"Ready"})
    [instance] = node.get("/cluster")["instances"]
    assert instance["rank_count"] == rank_count
    return instance["stages"]


def seen(nodes: list[NodeProcess]) -> None:
    until(lambda: all(len(node.visibility()) == len(nodes) for node in nodes))


@pytest.mark.parametrize(("names", "rank_count"), [("ab", 2), ("abcd", 2)])
def test_nodes_that_share_layers_answer_as_one(tmp_path: Path, names: str, rank_count: int) -> None:
    model = write_model(tmp_path / "model.gguf", layers=4)
    with running(tmp_path, *names) as nodes:
        seen(nodes)
        nodes[0].post("/place_instance", {"model_id": str(model)})
        until(lambda: list(nodes[0].runners().values()) == ["Ready"])
        alone = nodes[0].ask(str(model), "hello", max_tokens=60)
        [instance] = nodes[0].get("/cluster")["instances"]
        nodes[0].delete(f"/instance/{instance['instance_id']}")
        until(lambda: not nodes[0].runners())
        stages = place(nodes[0], model, rank_count, min_nodes=len(names))
        assert len({stage["node_id"] for stage in stages}) == len(names)
        assert [stage["rank"] for stage in stages] == [0, 1] * (len(names) // 2)
        assert nodes[-1].ask(str(model), "hello", max_tokens=60) == alone
        shards = nodes[0].get("/state")["instances"].popitem()[1]["MlxRingInstance"]["shardAssignments"]
        assert {next(iter(shard)) for shard in shards["runnerToShard"].values()} == {"TensorShardMetadata"}


FAULTS: dict[str, Callable[[NodeProcess], None]] = {
    "runner is killed": lambda node: runner_of(node).kill(),
    "runner stands still": lambda node: runner_of(node).send_signal(signal.SIGSTOP),
    "node is killed": lambda node: node.process.kill(),
    "machine stands still": stop_all,
}


@pytest.fixture
def three(tmp_path: Path) -> Generator[tuple[NodeProcess, NodeProcess, NodeProcess, Path]]:
    """Who is asked, and the two that share all layers: rank 0, which is the head, and rank 1."""
    model = write_model(tmp_path / "model.gguf", layers=4)
    with running(tmp_path, "a", "b", "c") as nodes:
        asked = nodes[0]
        seen(nodes)
        stages = place(asked, model, 2, node_ids=[node.node_id for node in nodes[1:]])
        by_id = {node.node_id: node for node in nodes}
        head, other = (by_id[stage["node_id"]] for stage in stages)
        family = [child for node in nodes for child in node.children()]
        yield asked, head, other, model
    for process in family:  # what stands still does not notice the end of its node
        with suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_an_answer_goes_on_whichever_rank_is_lost(
    three: tuple[NodeProcess, NodeProcess, NodeProcess, Path], rank: int, fault: str
) -> None:
    """Where no other node may take its place, the one that is left holds all layers alone."""
    asked, head, other, model = three
    prompt, undisturbed = long_prompt_of(asked, model, TOKENS)
    answer = Answer(asked, model, prompt, TOKENS)
    until(lambda: len(answer.token_ids) > FAULT_AFTER)
    FAULTS[fault](other if rank else head)
    assert answer.wait() == undisturbed
    print(f"rank {rank}'s {fault}: {max(answer.gaps_s):.2f} s without a token")


def test_what_cannot_be_shared_is_refused_with_a_sentence(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", layers=4)
    with running(tmp_path, "a") as (node,):
        for fields, status, words in (
            ({"rank_count": 2}, 409, "2 ranks need 2 nodes, only 1 is here"),
            ({"sharding": "Tensor", "min_nodes": 2}, 409, "only 1 is here"),
            ({"rank_count": 3}, 400, "can't be cut into 3 ranks"),
            ({"rank_count": 2, "min_nodes": 3}, 400, "can't be divided into stages of 2 ranks"),
            ({"rank_count": 0}, 400, "rank_count"),
            ({"rank_count": -1}, 400, "rank_count"),
        ):
            answer = httpx.post(f"{node.url}/place_instance", json={"model_id": str(model), **fields}, timeout=30)
            assert answer.status_code == status, answer.text
            assert words in answer.json()["error"]["message"]


def test_three_nodes_that_share_the_demo_model_say_what_one_says(tmp_path: Path, demo_model: Path) -> None:
    """With real numbers, in exact mode, and as a person asks for it."""
    question = "Name the capital of France, and one thing that it is known for."
    with running(tmp_path, "a", "b", "c", engine="onnx") as nodes:
        seen(nodes)

        def covey(*arguments: str) -> tuple[int, str]:
            done = CliRunner().invoke(app, arguments, env={"COVEY_URL": nodes[0].url, "COLUMNS": "200"})
            return done.exit_code, " ".join(done.output.split())

        def place_and_ask(*options: str) -> str:
            status, output = covey("place", str(demo_model), "--exact", *options)
            assert status == 0, output
            return nodes[1].ask(str(demo_model), question, max_tokens=24)

        alone = place_and_ask()
        assert covey("stop", "--all")[0] == 0
        until(lambda: not nodes[0].runners())
        assert place_and_ask("--tensor", "3") == alone
        [instance] = nodes[0].get("/cluster")["instances"]
        assert [stage["rank"] for stage in instance["stages"]] == [0, 1, 2]
        assert "3 ranks" in covey("ps")[1]
        status, output = covey("place", str(demo_model), "--another", "--tensor", "2")
        assert status == 1
        assert "can't be cut into 2 ranks; possible is 3 or 9" in output
