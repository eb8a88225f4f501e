"""What the leader mends, one wish at a time."""

from collections.abc import Collection

from msgspec.structs import replace

from covey.control.cluster import INSTANCE, WISH, Cluster, Context, Written
from covey.control.placement.memory import Load, shard_bytes
from covey.control.placement.nodes import Candidate
from covey.control.tending import REST_MS, Tending
from covey.schema.cluster import Instance, NodeReport, RunnerReport, Stage, Wish
from covey.schema.ids import InstanceId, NodeId, RunnerId
from covey.schema.model import Shard
from covey.schema.runner import RunnerState
from simulation.people import SMALL

ADA, BEA, LOST = NodeId("ada"), NodeId("bea"), NodeId("lost")
WISHED = Wish(wish_id="w", card=SMALL, node_count_min=1, context_length=512, slot_count=1)
NEEDED = shard_bytes(Load(SMALL, 512, 1), Shard(0, 6, 6))
WAIT_MS = 60_000


def instance(mark: str, node_id: NodeId) -> Instance:
    stage = Stage(RunnerId(f"w.{mark}.0"), node_id, Shard(0, 6, 6), NEEDED)
    return Instance(
        instance_id=InstanceId(f"w.{mark}"),
        wish_id="w",
        card=SMALL,
        context_length=512,
        slot_count=1,
        engine="fake",
        stages=(stage,),
    )


def node(node_id: NodeId, free_bytes: int) -> Candidate:
    return Candidate(
        node_id=node_id,
        name=node_id,
        machine_id=node_id,
        memory_bytes_total=10**10,
        memory_bytes_free=free_bytes,
    )


def written(assigned: Instance) -> Written:
    return Written(INSTANCE + assigned.instance_id, assigned)


class Leader:
    """The leader's tending, with what it sees written by hand."""

    def __init__(self) -> None:
        self.cluster = Cluster(ADA)
        self.cluster.apply((Written(WISH + "w", WISHED),))
        self.tending = Tending(self.cluster, WAIT_MS)
        self.nodes: tuple[Candidate, ...] = ()
        self.wish = WISHED
        self.mark = "a-1-99"
        self.reports: dict[NodeId, NodeReport] = {}

    def report(self, assigned: Instance, waiting: str) -> None:
        """What the node of its only stage says."""
        [stage] = assigned.stages
        runner = RunnerReport(
            runner_id=stage.runner_id,
            instance_id=assigned.instance_id,
            state=RunnerState.IDLE,
            attempt=1,
            waiting=waiting,
        )
        self.reports[stage.node_id] = NodeReport(
            node_id=stage.node_id,
            boot=1,
            sequence=1,
            name=stage.node_id,
            version="1",
            api_address=None,
            hardware=None,
            downloads=(),
            runners=(runner,),
        )

    def mend(self, now_ms: int = 0, gone: Collection[NodeId] = (LOST,)) -> dict[str, Instance | None]:
        """What is written, as in one round of mending."""
        self.tending.look_around(now_ms, gone, self.reports)
        events = self.tending.mend(self.wish, lambda _: self.context(), self.reports, gone)
        self.cluster.apply(events)
        return {event.key.removeprefix(INSTANCE): event.value for event in events}  # type: ignore[misc]

    def context(self) -> Context:
        return Context(command_id="w", asked_at=None, instance_mark=self.mark, engine="fake", nodes=self.nodes)


def test_of_the_dormant_the_latest_assigned_are_kept_whatever_their_ids_and_whoever_assigned_them() -> None:
    leader = Leader()
    leader.cluster.apply((written(instance("a-1-9", LOST)),))
    other = Cluster(BEA)
    other.merge(leader.cluster.entries)
    leader.cluster.merge(other.apply((written(instance("b-1-3", LOST)),)))
    leader.cluster.apply((written(instance("a-1-10", LOST)),))
    assert leader.mend() == {"w.a-1-9": None}


def test_after_a_power_cut_the_latest_assigned_is_kept_whatever_their_ids() -> None:
    """Both may be whole, for all that is known yet: the node that the first one lost has not been missed for long."""
    for marks in (("a", "b"), ("b", "a")):
        leader = Leader()
        for mark, node_id in zip(marks, (LOST, ADA), strict=True):
            leader.cluster.apply((written(instance(mark, node_id)),))
        assert leader.mend(gone=()) == {f"w.{marks[0]}": None}


def test_what_could_not_be_placed_is_not_remembered_for_longer_than_its_wish() -> None:
    leader = Leader()
    assert leader.mend() == {}
    assert list(leader.tending.refused_with) == ["w"]
    leader.cluster.apply((Written(WISH + "w", None),))
    leader.tending.look_around(1, [], {})
    assert leader.tending.refused_with == {}


def serving_on_ada(leader: Leader, requests: int = 0) -> Instance:
    """A wish for two nodes, of which one was there."""
    assigned = instance("a-1-1", ADA)
    leader.cluster.apply((written(assigned),))
    leader.report(assigned, "")
    report = leader.reports[ADA]
    runner = replace(report.runners[0], state=RunnerState.READY, requests_running=requests)
    leader.reports[ADA] = replace(report, runners=(runner,))
    return assigned


WIDE = replace(WISHED, node_count_min=2)


def has_file(leader: Leader, node_id: NodeId) -> None:
    """It is there, serves nothing, and has the model on its disk."""
    report = replace(leader.reports[ADA], node_id=node_id, runners=(), models_on_disk=(SMALL.model_id,))
    leader.reports[node_id] = report


def test_an_instance_that_rests_is_spread_over_as_many_nodes_as_were_asked_for() -> None:
    leader = Leader()
    leader.wish = WIDE
    serving_on_ada(leader)
    has_file(leader, BEA)
    leader.nodes = (node(ADA, 10**10), node(BEA, 10**10))
    assert leader.mend() == {}
    assert leader.mend(REST_MS - 1) == {}
    events = leader.mend(REST_MS)
    assert events["w.a-1-1"] is None
    moved = events["w.a-1-99"]
    assert moved is not None
    assert sorted(stage.node_id for stage in moved.stages) == [ADA, BEA]


def test_where_spreading_it_went_wrong_what_served_before_serves_again_and_it_is_not_tried_twice() -> None:
    leader = Leader()
    leader.wish = WIDE
    before = serving_on_ada(leader)
    has_file(leader, BEA)
    leader.nodes = (node(ADA, 10**10), node(BEA, 10**10))
    leader.mend()
    [moved] = [each for each in leader.mend(REST_MS).values() if each]
    failed = [
        RunnerReport(runner_id=stage.runner_id, instance_id=moved.instance_id, state=RunnerState.FAILED, attempt=4)
        for stage in moved.stages
        if stage.node_id == BEA
    ]
    leader.reports[BEA] = replace(leader.reports[BEA], runners=tuple(failed))
    leader.mark = "a-1-100"
    events = leader.mend(REST_MS + 1)
    [back] = [each for each in events.values() if each]
    assert [(stage.node_id, stage.shard) for stage in back.stages] == [(ADA, before.stages[0].shard)]
    assert events[moved.instance_id] is None
    for now_ms in (REST_MS + 2, 3 * REST_MS, 5 * REST_MS):
        assert leader.mend(now_ms) == {}


def test_an_instance_that_serves_or_whose_nodes_are_not_back_stays() -> None:
    busy, alone, narrow, bare = Leader(), Leader(), Leader(), Leader()
    busy.wish = alone.wish = bare.wish = WIDE
    serving_on_ada(busy, requests=1)
    for leader in (alone, narrow, bare):
        serving_on_ada(leader)
    for leader in (busy, alone, narrow):
        has_file(leader, BEA)
    busy.nodes = narrow.nodes = bare.nodes = (node(ADA, 10**10), node(BEA, 10**10))
    alone.nodes = (node(ADA, 10**10),)
    for leader in (busy, alone, narrow, bare):
        leader.mend()
        assert leader.mend(REST_MS) == {}


def waiting_on_bea() -> Leader:
    leader = Leader()
    assigned = instance("a-1-1", BEA)
    leader.cluster.apply((written(assigned),))
    leader.report(assigned, "has too little memory now")
    leader.nodes = (node(ADA, 2 * NEEDED), node(BEA, NEEDED // 2))
    return leader


def test_what_has_waited_for_memory_for_a_while_is_placed_where_there_is_some() -> None:
    leader = waiting_on_bea()
    assert leader.mend(0) == {}
    assert leader.mend(WAIT_MS - 1) == {}
    events = leader.mend(WAIT_MS)
    assert events.pop("w.a-1-1") is None
    [placed] = events.values()
    assert placed is not None
    assert [stage.node_id for stage in placed.stages] == [ADA]


def test_a_wait_for_memory_that_ends_is_forgotten() -> None:
    leader = waiting_on_bea()
    leader.mend(0)
    leader.report(instance("a-1-1", BEA), "")
    leader.mend(WAIT_MS - 1)
    leader.report(instance("a-1-1", BEA), "has too little memory now")
    assert leader.mend(WAIT_MS) == {}


def test_what_fits_nowhere_else_goes_on_waiting_for_memory() -> None:
    leader = waiting_on_bea()
    leader.mend(0)
    leader.nodes = (node(ADA, NEEDED // 2), node(BEA, NEEDED // 2))
    assert leader.mend(WAIT_MS) == {}
    leader.nodes = (node(ADA, NEEDED // 2), node(BEA, 2 * NEEDED))  # it is not placed anew where it is
    assert leader.mend(WAIT_MS + 1) == {}
    leader.nodes = (node(ADA, 2 * NEEDED), node(BEA, NEEDED // 2))
    assert len(leader.mend(WAIT_MS + 2)) == 2


def test_nodes_that_were_chosen_stay_the_only_ones() -> None:
    leader = waiting_on_bea()
    chosen = replace(WISHED, node_ids=(BEA,))
    leader.tending.look_around(0, [], leader.reports)
    leader.tending.look_around(WAIT_MS, [], leader.reports)
    assert leader.tending.mend(chosen, lambda _: leader.context(), leader.reports, []) == ()
