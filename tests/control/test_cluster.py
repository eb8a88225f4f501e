"""Intent: merging is free of order, and a command is carried out once, whoever leads."""

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from covey.control.cluster import Cluster, Context, Decision, wish_of
from covey.control.placement.nodes import Candidate
from covey.control.settings import TOMBSTONES_MAX
from covey.schema.cluster import Accepted, DeleteInstance, Entry, PlaceModel, Refused, Version
from covey.schema.ids import InstanceId, NodeId
from simulation.people import SMALL

ADA = Candidate(node_id=NodeId("a"), name="ada", machine_id="box", memory_bytes_total=10**10, memory_bytes_free=10**10)


def context(command_id: str = "command", mark: str = "a-1-1") -> Context:
    return Context(command_id=command_id, asked_at=None, instance_mark=mark, engine="fake", nodes=(ADA,))


def carry_out(cluster: Cluster, command: PlaceModel | DeleteInstance, mark: str = "a-1-1") -> InstanceId:
    decision = cluster.decide(command, context(mark=mark))
    assert isinstance(decision, Decision)
    assert isinstance(decision.outcome, Accepted)
    cluster.apply(decision.events)
    return InstanceId(decision.outcome.effect_id)


entries = st.builds(
    Entry,
    st.none(),
    st.builds(Version, st.integers(1, 4), st.sampled_from([NodeId("a"), NodeId("b")])),
)
maps = st.dictionaries(st.sampled_from(["instance/x.1", "instance/y.1", "unknown/z"]), entries)


@given(st.lists(maps, max_size=4), st.randoms())
def test_the_order_of_merges_does_not_matter(parts: list[dict[str, Entry]], random: object) -> None:
    forwards, backwards = Cluster(NodeId("a")), Cluster(NodeId("b"))
    for part in parts:
        forwards.merge(part)
    for part in [*reversed(parts), *parts]:
        backwards.merge(part)
    assert forwards.entries == backwards.entries
    assert forwards.digest == backwards.digest


def test_two_values_with_one_version_end_the_same_everywhere() -> None:
    """A node that lost its memory wrote the same version of the same key again."""
    one, other = Cluster(NodeId("a")), Cluster(NodeId("a"))
    carry_out(one, PlaceModel(card=SMALL))
    carry_out(other, PlaceModel(card=SMALL, slot_count=1))
    first, second = dict(one.entries), dict(other.entries)
    one.merge(second)
    other.merge(first)
    assert one.entries == other.entries


def test_the_same_command_again_is_the_same_instance_even_elsewhere() -> None:
    first = Cluster(NodeId("a"))
    made = carry_out(first, PlaceModel(card=SMALL))
    second = Cluster(NodeId("b"))
    second.merge(first.entries)
    assert carry_out(second, PlaceModel(card=SMALL), mark="b-1-1") == made
    assert len(second.instances) == 1


def test_the_same_command_again_does_not_revive_what_was_deleted() -> None:
    cluster = Cluster(NodeId("a"))
    made = carry_out(cluster, PlaceModel(card=SMALL))
    carry_out(cluster, DeleteInstance(made))
    assert carry_out(cluster, PlaceModel(card=SMALL), mark="a-1-2") == made
    assert not cluster.instances


def test_deleting_takes_the_wish_and_its_later_instances_along() -> None:
    """The leader had moved it meanwhile; whoever deletes the old id means the model."""
    cluster = Cluster(NodeId("a"))
    old = carry_out(cluster, PlaceModel(card=SMALL))
    new = replace(cluster.instances[old], instance_id=InstanceId(f"{wish_of(old)}.b-1-7"))
    cluster.merge({f"instance/{new.instance_id}": Entry(new, Version(9, NodeId("b")))})
    cluster.merge({f"instance/{old}": Entry(None, Version(10, NodeId("b")))})
    assert list(cluster.instances) == [new.instance_id]
    carry_out(cluster, DeleteInstance(old))
    assert not cluster.wishes
    assert not cluster.instances


def test_counters_from_the_future_are_not_taken_in() -> None:
    """A member with a bad disk or bad intentions: versions near the end of their range would be the last ever."""
    cluster = Cluster(NodeId("a"))
    carry_out(cluster, PlaceModel(card=SMALL))
    before = dict(cluster.entries)
    key = next(iter(before))
    assert not cluster.merge({key: Entry(None, Version(2**63, NodeId("b")))})
    assert cluster.entries == before
    assert cluster.merge({key: Entry(None, Version(1_000_000, NodeId("b")))})


def test_deleting_twice_is_success_and_what_never_was_is_not_found() -> None:
    cluster = Cluster(NodeId("a"))
    made = carry_out(cluster, PlaceModel(card=SMALL))
    carry_out(cluster, DeleteInstance(made))
    assert carry_out(cluster, DeleteInstance(made)) == made
    refused = cluster.decide(DeleteInstance(InstanceId("never.was")), context())
    assert isinstance(refused, Refused)
    assert refused.status == 404


def test_tombstones_are_bounded_and_the_newest_stay() -> None:
    cluster = Cluster(NodeId("a"))
    deleted = {f"instance/{n}.a-1-1": Entry(None, Version(n + 1, NodeId("a"))) for n in range(TOMBSTONES_MAX + 5)}
    cluster.merge(deleted)
    assert len(cluster.entries) == TOMBSTONES_MAX
    assert "instance/4.a-1-1" not in cluster.entries
    assert "instance/5.a-1-1" in cluster.entries
