"""Intent: merging is free of order, and a command is carried out once, whoever leads."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from covey.control.cluster import Cluster, Context, Decision, Written, assignment, encoded, options_of, wish_of
from covey.control.placement.nodes import Candidate
from covey.control.placement.place import Options, Placement, place
from covey.control.settings import TOMBSTONES_MAX
from covey.control.tending import Tending
from covey.schema.cluster import (
    Accepted,
    DeleteInstance,
    Entry,
    Forgotten,
    Instance,
    PlaceModel,
    Rebalance,
    Refused,
    Value,
    Version,
    Wish,
)
from covey.schema.ids import InstanceId, NodeId
from covey.schema.model import QuantizedBytes, Quantizing
from simulation.people import SMALL

ADA = Candidate(node_id=NodeId("a"), name="ada", machine_id="box", memory_bytes_total=10**10, memory_bytes_free=10**10)

QUANTIZABLE = replace(SMALL, quantized=(QuantizedBytes(Quantizing.Q4, (1,) * SMALL.layer_count, 1, 1),))


def context(command_id: str = "command", mark: str = "a-1-1") -> Context:
    return Context(command_id=command_id, asked_at=None, instance_mark=mark, engine="fake", nodes=(ADA,))


def place_small() -> Placement:
    placement = place(SMALL, (ADA,), Options())
    assert isinstance(placement, Placement)
    return placement


def carry_out(cluster: Cluster, command: PlaceModel | DeleteInstance, mark: str = "a-1-1") -> InstanceId:
    decision = cluster.decide(command, context(mark=mark))
    assert isinstance(decision, Decision)
    assert isinstance(decision.outcome, Accepted)
    cluster.apply(decision.events)
    return InstanceId(decision.outcome.effect_id)


entries = st.builds(
    Entry,
    st.sampled_from([None, b"one", b"other"]),
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
    cluster.merge({f"instance/{new.instance_id}": Entry(encoded(new), Version(9, NodeId("b")))})
    cluster.merge({f"instance/{old}": Entry(None, Version(10, NodeId("b")))})
    assert list(cluster.instances) == [new.instance_id]
    carry_out(cluster, DeleteInstance(old))
    assert not cluster.wishes
    assert not cluster.instances


def test_what_was_deleted_at_one_leader_does_not_come_back_from_another() -> None:
    """The simulator's seed 24165: each carried the same command out, and the one that deleted it counts less far."""
    here, there = Cluster(NodeId("a")), Cluster(NodeId("b"))
    there.apply(tuple(Written(f"instance/gone.{number}", None) for number in range(40)))
    carry_out(there, PlaceModel(card=SMALL), mark="b-1-1")
    made = carry_out(here, PlaceModel(card=SMALL))
    carry_out(here, DeleteInstance(made))
    first, second = dict(here.entries), dict(there.entries)
    here.merge(second)
    there.merge(first)
    assert here.entries == there.entries
    assert here.digest == there.digest
    assert not there.wishes
    assert here.entries["wish/command"].version > second["wish/command"].version  # also for those that go by that alone
    there.apply(Tending(there, 60_000).leftovers())
    assert not there.instances


def test_a_wish_that_waits_for_a_place_can_be_ended_by_its_own_id() -> None:
    cluster = Cluster(NodeId("a"))
    made = carry_out(cluster, PlaceModel(card=SMALL))
    cluster.apply((Written(f"instance/{made}", None),))
    waiting = InstanceId(wish_of(made))
    assert carry_out(cluster, DeleteInstance(waiting)) == waiting
    assert not cluster.wishes
    again = cluster.decide(DeleteInstance(waiting), context())
    assert again == Decision((), Accepted(waiting), (f"wish/{waiting}",))


def test_deleting_ends_a_wish_that_is_not_here() -> None:
    """The power was cut while both were written, and only the instance arrived; the others still hold the wish."""
    whole, torn = Cluster(NodeId("b")), Cluster(NodeId("a"))
    made = carry_out(whole, PlaceModel(card=SMALL))
    torn.merge({f"instance/{made}": whole.entries[f"instance/{made}"]})
    carry_out(torn, DeleteInstance(made))
    whole.merge(torn.entries)
    assert not whole.wishes
    assert not whole.instances
    again = torn.decide(DeleteInstance(made), context())
    assert isinstance(again, Decision)
    assert again.events == ()


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


def test_exactness_goes_from_the_command_to_the_instance() -> None:
    cluster = Cluster(NodeId("a"))
    made = carry_out(cluster, PlaceModel(card=SMALL, exact=True))
    assert cluster.wishes[wish_of(made)].exact
    assert cluster.instances[made].exact
    assert assignment(cluster.wishes[wish_of(made)], place_small(), context(mark="b-1-1")).exact  # placed again


def test_quantising_goes_from_the_command_to_the_instance_and_where_that_is_placed_again() -> None:
    cluster, wanted = Cluster(NodeId("a")), Quantizing.Q4
    made = carry_out(cluster, PlaceModel(card=QUANTIZABLE, quantize=wanted))
    wish = cluster.wishes[wish_of(made)]
    assert (wish.quantize, cluster.instances[made].quantize) == (wanted, wanted)
    assert options_of(wish, (ADA,)).quantize is wanted
    assert assignment(wish, place_small(), context(mark="b-1-1")).quantize is wanted


@pytest.mark.parametrize("value", [Wish, Instance])
def test_versions_that_know_these_ways_and_those_that_do_not_read_one_another(value: type[Wish | Instance]) -> None:
    """The card keeps what full precision takes, so that an older leader counts rightly what it places in full."""
    cluster = Cluster(NodeId("a"))
    made = carry_out(cluster, PlaceModel(card=QUANTIZABLE, exact=True, quantize=Quantizing.Q4))
    mine = cluster.wishes[wish_of(made)] if value is Wish else cluster.instances[made]
    later = ("exact", "quantize")
    fields = [(each.name, each.type) for each in msgspec.structs.fields(value) if each.name not in later]
    config = value.__struct_config__
    older = msgspec.defstruct(value.__name__, fields, frozen=True, kw_only=True, tag=config.tag)
    read = msgspec.msgpack.decode(encoded(mine) or b"", type=older)
    back = msgspec.msgpack.decode(msgspec.msgpack.encode(read), type=value)
    assert back == replace(mine, exact=False, quantize=None)
    assert back.card.layer_bytes == SMALL.layer_bytes


# ---- what a newer version wrote ----


def newer(key: str = "quota/x", counter: int = 5) -> dict[str, Entry]:
    """An entry of a type that this version does not know."""
    return {key: Entry(b"\x82\xa4type\xa5quota\xa5limit\x07", Version(counter, NodeId("b")))}


def test_what_a_newer_version_wrote_is_held_and_passed_on_byte_for_byte() -> None:
    cluster = Cluster(NodeId("a"))
    carry_out(cluster, PlaceModel(card=SMALL))
    assert cluster.merge(newer()) == newer()
    assert cluster.entries["quota/x"] == newer()["quota/x"]
    assert cluster.unread == ("quota/x",)
    assert not cluster.merge(newer(counter=4))
    assert cluster.merge({"quota/x": Entry(None, Version(6, NodeId("b")))})
    assert cluster.unread == ()


def odd_values() -> dict[str, Value]:
    """What no node of ours writes. It would be in every store, and end each node at each of its starts."""
    wish = Wish(wish_id="w", card=SMALL, node_count_min=1, context_length=512, slot_count=1)
    instance = assignment(wish, place_small(), context())
    return {
        f"instance/{instance.instance_id}": replace(instance, stages=()),
        "instance/another": instance,
        "wish/another": wish,
        "key/another": wish,
        "forgotten": wish,
    }


@pytest.mark.parametrize("key", odd_values())
def test_a_value_that_makes_no_sense_is_held_unread(key: str) -> None:
    value = odd_values()[key]
    cluster = Cluster(NodeId("a"))
    entry = Entry(encoded(value), Version(5, NodeId("b")))
    assert cluster.merge({key: entry}) == {key: entry}
    assert cluster.unread == (key,)
    assert (cluster.wishes, cluster.instances, cluster.keys) == ({}, {}, {})
    cluster.merge({"wish/gone": Entry(None, Version(6, NodeId("b")))})
    assert cluster.entries[key] == entry


def test_an_instance_that_only_a_newer_version_understands_is_left_alone_but_can_be_deleted() -> None:
    cluster = Cluster(NodeId("a"))
    made = carry_out(cluster, PlaceModel(card=SMALL))
    wish = cluster.wishes[wish_of(made)]
    cluster.merge(newer(f"instance/{made}", 9))
    assert not Tending(cluster, 60_000).mend(
        wish, lambda _: context(), {}, ()
    )  # else it would be assigned a second time
    cluster.merge(newer("wish/other", 10))
    other = replace(wish, wish_id="other")
    instance = assignment(other, place_small(), context(mark="b-1-1"))
    cluster.apply((Written(f"instance/{instance.instance_id}", instance),))
    assert not Tending(cluster, 60_000).leftovers()  # its wish is there, though unread
    carry_out(cluster, DeleteInstance(made))
    assert all(entry.value is None for key, entry in cluster.entries.items() if wish_of(made) in key)


def test_a_version_from_the_far_future_is_not_taken() -> None:
    cluster = Cluster(NodeId("a"))
    for counter in (-1, 0, 2**53 + 1, 2**64):
        assert not cluster.merge({"wish/x": Entry(None, Version(counter, NodeId("b")))})
    assert cluster.counter == 0


# ---- deletions ----


def test_what_the_leader_declared_forgotten_is_forgotten_by_everybody_in_any_order() -> None:
    deleted = {f"wish/{n}": Entry(None, Version(n, NodeId("a"))) for n in range(1, 10)}
    mark = {"forgotten": Entry(encoded(Forgotten(6)), Version(10, NodeId("a")))}
    first, second, third = (Cluster(NodeId(name)) for name in "abc")
    first.merge(deleted)
    assert {key for key, entry in first.merge(mark).items() if entry is None} == {f"wish/{n}" for n in range(1, 7)}
    second.merge(mark)
    second.merge(deleted)
    third.merge({**deleted, **mark})
    assert first.entries == second.entries == third.entries
    assert first.digest == second.digest == third.digest
    assert list(first.entries) == ["forgotten", "wish/7", "wish/8", "wish/9"]


@given(st.lists(maps, max_size=4))
def test_the_digest_follows_from_the_map_alone(parts: list[dict[str, Entry]]) -> None:
    """It is kept up to date entry by entry; a fresh map with the same content has the same one."""
    grown, fresh = Cluster(NodeId("a")), Cluster(NodeId("a"))
    for part in parts:
        grown.merge(part)
    fresh.merge(grown.entries)
    assert fresh.digest == grown.digest
    assert (grown.digest == Cluster(NodeId("b")).digest) == (not grown.entries)


def test_after_many_deletions_new_versions_are_still_higher_than_all_before() -> None:
    cluster = Cluster(NodeId("a"), tombstones_max=2)
    for number in range(5):
        made = carry_out(cluster, PlaceModel(card=SMALL), mark=f"a-1-{number}")
        carry_out(cluster, DeleteInstance(made))
        cluster.merge(
            {"forgotten": Entry(encoded(Forgotten(cluster.counter)), Version(cluster.counter + 1, ADA.node_id))}
        )
    assert cluster.stamp((Written("wish/x", None),))["wish/x"].version.counter > 20


# ---- moving ----


def test_an_instance_is_placed_as_its_wish_would_be_now_and_only_once() -> None:
    cluster = Cluster(NodeId("a"))
    made = _wide(cluster)
    bea = replace(ADA, node_id=NodeId("bea"), name="bea", machine_id="bea")
    asked = replace(context(mark="a-1-2"), nodes=(ADA, bea), standing=(cluster.instances[made],))
    decision = cluster.decide(Rebalance(made), asked)
    assert isinstance(decision, Decision)
    cluster.apply(decision.events)
    [moved] = cluster.instances.values()
    assert decision.outcome.effect_id == moved.instance_id != made
    assert len(moved.stages) == 2
    again = cluster.decide(Rebalance(made), replace(asked, standing=(moved,)))
    assert again == Decision((), Accepted(moved.instance_id), (f"instance/{moved.instance_id}",))


def _wide(cluster: Cluster) -> InstanceId:
    """Two nodes were asked for, and one has it."""
    made = carry_out(cluster, PlaceModel(card=SMALL))
    [wish] = cluster.wishes.values()
    cluster.apply((Written(f"wish/{wish.wish_id}", replace(wish, node_count_min=2)),))
    return made


def test_what_is_placed_well_stays() -> None:
    cluster = Cluster(NodeId("a"))
    made = carry_out(cluster, PlaceModel(card=SMALL))
    asked = replace(context(mark="a-1-2"), standing=(cluster.instances[made],))
    assert cluster.decide(Rebalance(made), asked) == Decision((), Accepted(made), (f"instance/{made}",))


def test_what_is_not_there_or_not_whole_is_not_moved() -> None:
    cluster = Cluster(NodeId("a"))
    made = carry_out(cluster, PlaceModel(card=SMALL))
    nothing, broken = (cluster.decide(Rebalance(asked), context()) for asked in (InstanceId("x.1"), made))
    assert isinstance(nothing, Refused)
    assert isinstance(broken, Refused)
    assert (nothing.status, broken.status) == (404, 409)
