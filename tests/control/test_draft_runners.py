"""The draft of an instance: its head waits for both files and is told of both, and people of which one is missing."""

from typing import Any

from msgspec.structs import replace
from runner_bench import ME, OTHER, THEIRS, Bench, instance, second

from covey.control.placement.memory import Load, shard_bytes
from covey.control.routing import instance_status
from covey.control.tending import REST_MS
from covey.schema.cluster import (
    ClusterState,
    DownloadReport,
    DownloadState,
    Instance,
    InstancePhase,
    InstanceStatus,
    Member,
    NodeReport,
    Visibility,
)
from covey.schema.ids import ModelId, NodeId
from covey.schema.machine import RegroupRunner, StartRunner
from covey.schema.model import ModelCard, Shard
from covey.schema.pipeline import cards_needed, cards_placed
from covey.schema.runner import Draft, RunnerState
from simulation.people import LARGE, SMALL, card
from tests.control.test_machine import cluster_of, state
from tests.control.test_tending import ADA, BEA, Leader, has_file, node, serving_on_ada

TINY = card("tiny", 2, 1_000_000)


def told(draft: ModelCard, path: str) -> Draft:
    """What a head hears of it."""
    return Draft(model_path=path, layer_count=draft.layer_count, vocabulary_size=draft.vocabulary_size)


TOLD = told(TINY, "/tiny.gguf")


def drafted(stage_count: int) -> Instance:
    return replace(instance(stage_count), draft=TINY)


def bench_of(placed: Instance) -> Bench:
    bench = Bench()
    bench.instances = [placed]
    return bench


def others_head() -> Instance:
    """The other node has the first layers, this one the last."""
    mine, theirs = instance(2).stages
    stages = (replace(theirs, shard=Shard(0, 3, 6)), replace(mine, shard=Shard(3, 6, 6)))
    return replace(drafted(2), stages=stages)


# ---- files ----


def test_the_head_alone_needs_the_file_of_the_draft() -> None:
    assert cards_needed([drafted(2)], ME) == {"small": SMALL, "tiny": TINY}
    assert cards_needed([drafted(2)], OTHER) == {"small": SMALL}
    assert cards_needed([instance(2)], ME) == {"small": SMALL}
    assert cards_placed([drafted(2), second()]) == [SMALL, SMALL, TINY]


def test_what_is_a_draft_here_and_a_model_there_is_fetched_once() -> None:
    small_guesses = replace(second(), card=LARGE, draft=SMALL)
    assert cards_needed([small_guesses, instance(1)], ME) == {"large": LARGE, "small": SMALL}


def test_a_head_starts_when_both_files_are_there_and_is_told_of_both() -> None:
    bench = bench_of(drafted(1))
    assert bench.advance() == []
    bench.paths = {ModelId("tiny"): "/tiny.gguf"}
    assert bench.advance() == []
    bench.paths[ModelId("small")] = "/small.gguf"
    [start] = bench.advance()
    assert isinstance(start, StartRunner)
    assert start.spec.model_path == "/small.gguf"
    assert start.spec.draft == TOLD
    assert start.spec.engine_options == {}


def test_who_is_not_the_head_waits_for_no_draft_and_is_told_of_none() -> None:
    [start] = bench_of(others_head()).advance()
    assert isinstance(start, StartRunner)
    assert start.spec.draft is None


def test_without_a_draft_there_is_none_to_tell_of() -> None:
    [start] = Bench().advance()
    assert isinstance(start, StartRunner)
    assert start.spec.draft is None


def test_who_becomes_the_head_begins_anew_with_the_draft_once_its_file_is_there() -> None:
    """What it has loaded of the model stays."""
    bench = bench_of(others_head())
    bench.advance()
    bench.report(RunnerState.READY, 1, port=8)
    bench.until_ready()
    alone = replace(drafted(1).stages[0], runner_id=THEIRS)
    bench.instances = [replace(drafted(1), stages=(alone,))]
    bench.other = None
    bench.free_bytes = 10**9
    assert bench.advance() == []
    bench.paths[ModelId("tiny")] = "/tiny.gguf"
    [anew] = bench.advance()
    assert isinstance(anew, RegroupRunner)
    assert (anew.spec.shard, anew.spec.draft) == (Shard(0, 6, 6), TOLD)


def test_another_draft_is_another_instance() -> None:
    """Nothing of a process is kept for an instance that guesses otherwise: it ends, and a new one starts."""
    bench = bench_of(instance(1))
    bench.advance()
    bench.until_ready()
    bench.paths[ModelId("tiny")] = "/tiny.gguf"
    bench.instances = [replace(second(), draft=TINY)]
    assert not any(isinstance(effect, RegroupRunner) for effect in bench.advance())


# ---- what people are told ----


def download(model_id: str, state_: DownloadState, done: int = 0, reason: str = "") -> DownloadReport:
    return DownloadReport(
        model_id=ModelId(model_id), state=state_, bytes_done=done, bytes_total=100, bytes_per_second=0, reason=reason
    )


def said(*downloads: DownloadReport) -> InstanceStatus:
    """Of an instance whose head says this of its files."""
    placed = drafted(1)
    report = NodeReport(
        node_id=ME,
        boot=1,
        sequence=1,
        name="ada",
        version="1",
        api_address=None,
        hardware=None,
        downloads=downloads,
        runners=(),
    )
    member = Member(node_id=ME, visibility=Visibility.VISIBLE, heard_ms_ago=0, report=report)
    seen = ClusterState(node_id=ME, leader=ME, revision=1, members=(member,), wishes=(), instances=(placed,))
    return instance_status(seen, placed)


HERE = download("small", DownloadState.COMPLETED, 100)
ONGOING, FAILED = DownloadState.ONGOING, DownloadState.FAILED


def test_the_file_that_is_furthest_behind_is_named_where_it_is_the_drafts() -> None:
    assert said(download("small", ONGOING, 20), download("tiny", ONGOING, 50)).text == "downloading 20 %"
    behind = said(download("small", ONGOING, 50), download("tiny", ONGOING, 20))
    assert behind.text == "downloading its draft tiny, 20 %"
    assert said(HERE, download("tiny", ONGOING)).text == "looking for the file of its draft tiny"
    assert said(download("small", ONGOING), HERE).text == "looking for its file"
    again = said(HERE, download("tiny", ONGOING, 20, "no network")).text
    assert again == "downloading its draft tiny, 20 %; ada tries again after a failure (the draft tiny: no network)"


def test_a_draft_that_no_other_try_brings_is_named_in_the_failure() -> None:
    failed = said(HERE, download("tiny", FAILED, 0, "the disk is full"))
    assert (failed.phase, failed.text) == (InstancePhase.FAILED, "failed: the draft tiny: the disk is full")
    assert "`covey place small` tries again" in failed.explanation
    assert said(download("small", FAILED, 0, "the disk is full")).text == "failed: the disk is full"


# ---- in a cluster ----


def heads(world: Any, host: Any) -> list[Any]:
    """The specifications of the processes that serve as heads."""
    [placed] = state(host).instances
    return [
        each.spec
        for other in world.up()
        for each in other.processes
        if each.spec.runner_id == placed.stages[0].runner_id
    ]


def test_the_head_has_both_files_and_a_new_head_fetches_the_draft() -> None:
    world, hosts = cluster_of(3)
    world.people.place(hosts[0], LARGE, 2, draft=SMALL)
    world.run_until(12_000)
    [placed] = state(hosts[0]).instances
    assert instance_status(state(hosts[0]), placed).text == "ready"
    first, other = (world.host(stage.node_id) for stage in placed.stages)
    assert (sorted(first.files), sorted(other.files)) == (["large", "small"], ["large"])
    assert [spec.draft for spec in heads(world, other)] == [told(SMALL, "/models/small")]
    first.crash()
    world.run_until(40_000)
    [again] = state(other).instances
    assert again.draft == SMALL
    assert instance_status(state(other), again).text == "ready"
    assert "small" in world.host(again.stages[0].node_id).files
    assert [spec.draft for spec in heads(world, other)] == [told(SMALL, "/models/small")]


# ---- spread again ----


def resting(draft_at: tuple[NodeId, ...], free_at_ada: int) -> Leader:
    """A wish for two nodes, served by one: on which of them is the draft's file?"""
    leader = Leader()
    leader.wish = replace(leader.wish, card=LARGE, draft=SMALL, node_count_min=2)
    served = serving_on_ada(leader)
    whole = replace(served.stages[0], shard=Shard(0, 24, 24))
    drafted_there = replace(served, card=LARGE, draft=SMALL, stages=(whole,))
    leader.cluster.instances[served.instance_id] = drafted_there
    has_file(leader, BEA)
    for node_id in (ADA, BEA):
        models = (LARGE.model_id, *([SMALL.model_id] if node_id in draft_at else []))
        leader.reports[node_id] = replace(leader.reports[node_id], models_on_disk=models)
    leader.nodes = (node(ADA, free_at_ada), node(BEA, 10**10))
    leader.mend()
    return leader


LEAST_AT_ADA = shard_bytes(Load(LARGE, 512, 1), Shard(23, 24, 24)) * 10 // 9 + 10**6


def test_an_instance_is_spread_only_where_nothing_has_to_be_fetched_for_its_head() -> None:
    """Ada has too little left for the draft and any layer, so Bea would be the head."""
    assert resting((ADA,), LEAST_AT_ADA).mend(REST_MS) == {}
    moved = [each for each in resting((ADA, BEA), LEAST_AT_ADA).mend(REST_MS).values() if each]
    assert [stage.node_id for each in moved for stage in each.stages] == [BEA, ADA]
    moved = [each for each in resting((ADA,), 10**10).mend(REST_MS).values() if each]
    assert [stage.node_id for each in moved for stage in each.stages] == [ADA, BEA]
