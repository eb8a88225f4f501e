"""The runner of one rank on a bench: whom it is told to link with, when it warms up, and when it begins anew."""

import pytest
from msgspec.structs import replace
from runner_bench import ME, MINE, Bench, instance

from covey.control.runners import World
from covey.schema.cluster import Instance, NodeReport, RunnerReport, Stage
from covey.schema.ids import InstanceId, NodeId, RunnerId
from covey.schema.machine import Effect, RegroupRunner, StartRunner, TellRunner
from covey.schema.model import Shard
from covey.schema.runner import (
    Address,
    Connected,
    ConnectTo,
    Listening,
    Load,
    Loaded,
    Parted,
    Ready,
    RunnerSpec,
    RunnerState,
    WarmUp,
)

NAMES = ("n0", "n1", "n2", "n3")


def two_by_two(own: int, rank_count: int = 2) -> Instance:
    """Four runners, of which this node has the one at `own`."""
    stages = [
        Stage(
            MINE if place == own else RunnerId(f"i.{place}"),
            ME if place == own else NodeId(NAMES[place]),
            Shard(3 * (place // rank_count), 3 * (place // rank_count) + 3, 6) if rank_count == 2 else Shard(0, 6, 6),
            100,
            rank=place % rank_count,
        )
        for place in range(4)
    ]
    return replace(instance(1), stages=tuple(stages), rank_count=rank_count)


class RankBench(Bench):
    """What the nodes of the other three say is written by hand."""

    def __init__(self, own: int, rank_count: int = 2) -> None:
        super().__init__()
        self.own = own
        self.instances = [two_by_two(own, rank_count)]
        self.reports: dict[NodeId, NodeReport] = {}

    def say_of(self, place: int, state: RunnerState, attempt: int = 1, boot: int = 1) -> None:
        stage = self.instances[0].stages[place]
        runner = RunnerReport(
            runner_id=stage.runner_id,
            instance_id=InstanceId("i"),
            state=state,
            attempt=attempt,
            data_address=Address(NAMES[place], 7000 + place),
        )
        self.reports[stage.node_id] = NodeReport(
            node_id=stage.node_id,
            boot=boot,
            sequence=1,
            name=NAMES[place],
            version="1",
            api_address=None,
            hardware=None,
            downloads=(),
            runners=(runner,),
        )

    def all_others(self, state: RunnerState, attempt: int = 1) -> None:
        for place in range(4):
            if place != self.own:
                self.say_of(place, state, attempt)

    def advance(self, by_ms: int = 0) -> list[Effect]:
        self.now_ms += by_ms
        world = World(self.instances, self.reports, self.paths, self.free_bytes, self.is_memory_fresh)
        return self.runners.advance(self.now_ms, world)


def started(effects: list[Effect]) -> RunnerSpec:
    [spec] = [each.spec for each in effects if isinstance(each, StartRunner | RegroupRunner)]
    return spec


def told(effects: list[Effect]) -> list[object]:
    return [each.command for each in effects if isinstance(each, TellRunner)]


@pytest.mark.parametrize(
    ("own", "stage", "rank", "rank_nodes", "stage_nodes"),
    [
        (0, 0, 0, ("me", "n1"), ("me", "n2")),
        (1, 0, 1, ("n0", "me"), ("n0", "n2")),
        (2, 1, 0, ("me", "n3"), ("n0", "me")),
        (3, 1, 1, ("n2", "me"), ("n0", "n2")),
    ],
)
def test_each_runner_is_told_its_stage_and_its_rank(
    own: int, stage: int, rank: int, rank_nodes: tuple[str, ...], stage_nodes: tuple[str, ...]
) -> None:
    spec = started(RankBench(own).advance())
    assert (spec.stage_index, spec.stage_count, spec.rank, spec.rank_count) == (stage, 2, rank, 2)
    assert (spec.rank_node_ids, spec.stage_node_ids) == (rank_nodes, stage_nodes)


def ways(*places: int) -> tuple[tuple[Address, ...], ...]:
    return tuple((Address(NAMES[place], 7000 + place),) for place in places)


def test_a_first_rank_links_to_the_stages_beside_it_and_to_its_ranks() -> None:
    bench = RankBench(0)
    bench.advance()
    bench.all_others(RunnerState.CONNECTING)
    [command] = told(bench.say(Listening(7)))
    assert isinstance(command, ConnectTo)
    assert (command.next_stage, command.stage_before) == (ways(2)[0], ways(2)[0])
    assert command.ranks[1] == ways(1)[0]
    assert len(command.ranks) == 2


def test_a_higher_rank_links_to_its_ranks_alone() -> None:
    bench = RankBench(3)
    bench.advance()
    bench.all_others(RunnerState.CONNECTING)
    [command] = told(bench.say(Listening(7)))
    assert isinstance(command, ConnectTo)
    assert (command.next_stage, command.stage_before) == ((), ())
    assert command.ranks[0] == ways(2)[0]


def loaded(bench: RankBench) -> list[Effect]:
    """It has loaded; the others are connected at most."""
    bench.advance()
    bench.all_others(RunnerState.CONNECTING)
    bench.say(Listening(7))
    assert told(bench.say(Connected())) == [Load()]
    return bench.say(Loaded(5))


def test_ranks_warm_up_together() -> None:
    """They meet in their first step. One that loads from a slow disk is waited for without a limit on the others."""
    bench = RankBench(0)
    assert told(loaded(bench)) == []
    bench.say_of(1, RunnerState.LOADING)
    assert told(bench.advance(1_000_000)) == []
    bench.say_of(1, RunnerState.LOADED, attempt=2)  # of another generation
    bench.reports.pop(NodeId("n1"))
    assert told(bench.advance()) == []
    bench.say_of(1, RunnerState.WARMING_UP)
    assert told(bench.advance()) == [WarmUp()]


def test_other_stages_are_not_waited_for() -> None:
    bench = RankBench(0)
    bench.say_of(1, RunnerState.LOADED)
    loaded(bench)
    bench.say_of(1, RunnerState.LOADED)
    assert told(bench.advance()) == [WarmUp()]


@pytest.mark.parametrize(("own", "other"), [(0, 1), (1, 0), (0, 2)])
def test_where_the_node_of_a_linked_runner_was_started_anew_a_generation_begins(own: int, other: int) -> None:
    bench = ready(own)
    bench.say_of(other, RunnerState.READY, boot=2)
    assert started(bench.advance()).generation == 2


def test_a_rank_of_another_stage_is_no_neighbour() -> None:
    bench = ready(0)
    bench.say_of(3, RunnerState.READY, boot=2)
    assert bench.advance() == []


def ready(own: int) -> RankBench:
    bench = RankBench(own)
    loaded(bench)
    bench.all_others(RunnerState.READY)
    assert told(bench.advance()) == [WarmUp()]
    bench.say(Ready())
    return bench


@pytest.mark.parametrize("own", range(4))
def test_when_any_rank_begins_anew_all_do(own: int) -> None:
    bench = ready(own)
    bench.say_of((own + 1) % 4, RunnerState.CONNECTING, attempt=2)
    assert started(bench.advance()).generation == 2


def test_a_parted_rank_keeps_what_it_has_loaded() -> None:
    bench = ready(1)
    bench.say(Parted("rank 0 is lost."))
    assert bench.mine.holds == bench.mine.stage.shard
    bench.say_of(0, RunnerState.CONNECTING, attempt=2)
    assert isinstance(bench.advance()[0], RegroupRunner)


@pytest.mark.parametrize(("rank", "rank_count", "is_taken"), [(0, 2, True), (1, 2, False), (0, 4, False)])
def test_another_assignment_takes_a_process_over_only_at_the_same_rank_of_as_many(
    rank: int, rank_count: int, *, is_taken: bool
) -> None:
    bench = ready(0)
    moved = two_by_two(rank, rank_count)
    stages = tuple(replace(each, runner_id=RunnerId(f"j.{place}")) for place, each in enumerate(moved.stages))
    bench.instances = [replace(moved, instance_id=InstanceId("j"), stages=stages)]
    effects = bench.advance()
    assert any(isinstance(each, RegroupRunner) for each in effects) is is_taken
