"""What a loss costs, with real processes: whoever is left keeps its process and what that has loaded."""

from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from answers import Answer, long_prompt_of
from nodes import NodeProcess, cluster_name, until
from tiny_model import write_model

LAYERS = 6


def runner_id(node: NodeProcess) -> int:
    """The process id of its only runner; 0 while there is none."""
    found = [each.pid for each in node.children() if "covey.engine" in " ".join(each.cmdline())]
    return found[0] if len(found) == 1 else 0


class Cluster:
    """One node that is asked, and three that hold a model."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        self.home, self.name, self.stack = home, cluster_name(), stack
        self.asked, *holders = (self.start(name) for name in "abcd")
        until(lambda: all(len(node.visibility()) == 4 for node in (self.asked, *holders)))
        self.model = write_model(home / "model.gguf", layers=LAYERS)
        ids = [node.node_id for node in holders]
        self.asked.post("/place_instance", {"model_id": str(self.model), "min_nodes": 3, "node_ids": ids})
        self.wait_ready(3)
        by_id = {node.node_id: node for node in holders}
        self.holders = [by_id[stage["node_id"]] for stage in self.instance()["stages"]]

    def start(self, name: str) -> NodeProcess:
        node = NodeProcess(self.home, name, self.name)
        self.stack.callback(node.end)
        node.wait_listening()
        return node

    def instance(self) -> dict[str, Any]:
        [instance] = self.asked.get("/cluster")["instances"]
        return instance

    def layers(self) -> list[tuple[int, int]]:
        return [(each["shard"]["layer_start"], each["shard"]["layer_end"]) for each in self.instance()["stages"]]

    def wait_ready(self, count: int) -> None:
        def are_ready() -> bool:
            states = self.asked.runners()
            mine = [
                states.get(stage["runner_id"])
                for instance in self.asked.get("/cluster")["instances"]
                for stage in instance["stages"]
            ]
            return len(mine) == count and set(mine) <= {"Ready", "Running"}

        until(are_ready)


@pytest.fixture
def cluster(tmp_path: Path) -> Generator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(tmp_path, stack)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_runner_is_replaced_and_its_neighbours_go_on(cluster: Cluster, victim: int) -> None:
    before = [runner_id(node) for node in cluster.holders]
    prompt, undisturbed = long_prompt_of(cluster.asked, cluster.model, 150)
    answer = Answer(cluster.asked, cluster.model, prompt, 150)
    until(lambda: len(answer.token_ids) > 20)
    psutil.Process(before[victim]).kill()
    assert answer.wait() == undisturbed
    after = [runner_id(node) for node in cluster.holders]
    assert [place for place in range(3) if after[place] != before[place]] == [victim]
    print(f"stage {victim}: {max(answer.gaps_s):.2f} s without a token")


def test_a_lost_nodes_layers_go_to_its_neighbours_and_come_back_with_it(cluster: Cluster) -> None:
    head, middle, last = cluster.holders
    before = [runner_id(head), runner_id(last)]
    prompt, undisturbed = long_prompt_of(cluster.asked, cluster.model, 250)
    answer = Answer(cluster.asked, cluster.model, prompt, 250)
    until(lambda: len(answer.token_ids) > 20)
    middle.process.kill()
    until(lambda: len(cluster.layers()) == 2)
    cluster.wait_ready(2)
    assert cluster.layers() == [(0, 3), (3, 6)]
    assert [runner_id(head), runner_id(last)] == before
    cluster.start(middle.name)
    until(lambda: len(cluster.asked.visibility()) == 4 and set(cluster.asked.visibility().values()) == {"visible"})
    moved = cluster.asked.post(f"/instance/{cluster.instance()['instance_id']}/rebalance", {})
    until(lambda: cluster.instance()["instance_id"] == moved["instance_id"])
    cluster.wait_ready(3)
    assert cluster.layers() == [(0, 2), (2, 4), (4, 6)]
    assert {runner_id(head), runner_id(last)} == {*before}
    assert answer.wait() == undisturbed
    again = cluster.asked.post(f"/instance/{moved['instance_id']}/rebalance", {})
    assert again["instance_id"] == moved["instance_id"]
