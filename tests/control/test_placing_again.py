"""Placing an instance again after a loss: what is loaded stays where it is."""

from hypothesis import given
from hypothesis import strategies as some
from msgspec.structs import replace

from covey.control.placement.again import place_again, place_anew
from covey.control.placement.memory import Load, shard_bytes
from covey.control.placement.nodes import Candidate
from covey.control.placement.place import Options, Placement
from covey.schema.cluster import Instance, Refused, Stage
from covey.schema.ids import InstanceId, NodeId, RunnerId
from covey.schema.model import QuantizedBytes, Quantizing, Shard
from simulation.people import LARGE

GIGABYTE = 10**9
COUNT = LARGE.layer_count  # 24
LOAD = Load(LARGE, 512, 1)
OPTIONS = Options(context_length=512, slot_count=1)


def node(name: str, gigabytes: float = 100) -> Candidate:
    count_bytes = int(gigabytes * GIGABYTE)
    return Candidate(
        node_id=NodeId(name),
        name=name,
        machine_id=name,
        memory_bytes_total=count_bytes,
        memory_bytes_free=count_bytes,
    )


def former(*cuts: int) -> Instance:
    """Its stages are on a, b, c, ..., and end before these layers."""
    starts = [0, *cuts]
    stages = [
        Stage(RunnerId(f"i.{name}"), NodeId(name), Shard(start, end, COUNT), 1)
        for name, start, end in zip("abcdef", starts, cuts, strict=False)
    ]
    return Instance(
        instance_id=InstanceId("w.1"),
        wish_id="w",
        card=LARGE,
        context_length=512,
        slot_count=1,
        engine="fake",
        stages=tuple(stages),
    )


def layers(placement: Placement | None) -> dict[str, tuple[int, int]] | None:
    parts = placement.parts if placement else None
    return None if parts is None else {p.node_id: (p.shard.layer_start, p.shard.layer_end) for p in parts}


def room_for(start: int, end: int) -> float:
    """Gigabytes of free memory that a placement takes just this for: a tenth stays with the owner."""
    return (shard_bytes(LOAD, Shard(start, end, COUNT)) + 100) / 0.9 / GIGABYTE


def test_the_layers_of_a_lost_node_go_to_its_neighbours() -> None:
    again = place_again(former(8, 16, 24), [node("a"), node("c")], OPTIONS)
    assert layers(again) == {"a": (0, 12), "c": (12, 24)}


def test_the_first_and_the_last_stage_have_one_neighbour() -> None:
    assert layers(place_again(former(8, 16, 24), [node("b"), node("c")], OPTIONS)) == {"b": (0, 16), "c": (16, 24)}
    assert layers(place_again(former(8, 16, 24), [node("a"), node("b")], OPTIONS)) == {"a": (0, 8), "b": (8, 24)}
    assert layers(place_again(former(8, 16, 24), [node("b")], OPTIONS)) == {"b": (0, 24)}


def test_a_neighbour_takes_no_more_than_it_has_room_for() -> None:
    again = place_again(former(8, 16, 24), [node("a", room_for(0, 9)), node("c")], OPTIONS)
    found = layers(again)
    assert found is not None
    assert found["a"][1] in (8, 9)
    assert place_again(former(8, 16, 24), [node("a", room_for(0, 9)), node("c", room_for(15, 24))], OPTIONS) is None


def test_another_node_takes_what_the_survivors_have_no_room_for() -> None:
    nodes = [node("a", room_for(0, 9)), node("c", room_for(15, 24)), node("x")]
    assert layers(place_again(former(8, 16, 24), nodes, OPTIONS)) == {"a": (0, 8), "x": (8, 16), "c": (16, 24)}


def test_as_many_nodes_as_were_asked_for_are_used_while_they_are_there() -> None:
    three = replace(OPTIONS, node_count_min=3)
    again = place_again(former(8, 16, 24), [node("a"), node("c"), node("x")], three)
    assert layers(again) == {"a": (0, 8), "x": (8, 16), "c": (16, 24)}
    assert place_again(former(8, 16, 24), [node("a"), node("c")], three) is None


def test_two_gaps_are_filled_by_two_nodes() -> None:
    nodes = [node("b", room_for(6, 12)), node("d", room_for(18, 24)), node("x", 50), node("y", 40)]
    again = place_again(former(6, 12, 18, 24), nodes, replace(OPTIONS, node_count_min=4))
    found = layers(again)
    assert found is not None
    assert (found["b"], found["d"]) == ((6, 12), (18, 24))
    assert {found["x"], found["y"]} == {(0, 6), (12, 18)}


def test_nodes_that_were_not_chosen_get_nothing() -> None:
    chosen = replace(OPTIONS, node_ids=(NodeId("c"),))
    assert layers(place_again(former(8, 16, 24), [node("a"), node("c")], chosen)) == {"c": (0, 24)}


def test_quantised_weights_stay_so() -> None:
    small = QuantizedBytes(Quantizing.Q4, (LARGE.layer_bytes[0] // 4,) * COUNT, 0, 0)
    quantized = replace(former(8, 16, 24), card=replace(LARGE, quantized=(small,)), quantize=Quantizing.Q4)
    nodes, options = [node("a", room_for(0, 9)), node("c", room_for(15, 24))], replace(OPTIONS, quantize=Quantizing.Q4)
    assert layers(place_again(quantized, nodes, options)) is not None
    assert layers(place_again(former(8, 16, 24), nodes, OPTIONS)) is None
    anew = place_anew(quantized, nodes, options)
    assert isinstance(anew, Placement)
    assert sum(part.memory_bytes for part in anew.parts) < sum(LARGE.layer_bytes)


@given(
    cuts=some.sets(some.integers(1, COUNT - 1), min_size=1, max_size=5),
    gigabytes=some.lists(some.floats(0.5, 12), min_size=6, max_size=6),
    lost=some.sets(some.sampled_from("abcdef"), min_size=1),
    spare=some.floats(0.5, 12),
)
def test_whatever_is_lost_the_survivors_keep_theirs_and_nobody_gets_too_much(
    cuts: set[int], gigabytes: list[float], lost: set[str], spare: float
) -> None:
    instance = former(*sorted(cuts), COUNT)
    rooms = dict(zip("abcdef", gigabytes, strict=True))
    here = [stage for stage in instance.stages if stage.node_id not in lost]
    nodes = [node(stage.node_id, rooms[stage.node_id]) for stage in here] + [node("x", spare)]
    again = place_again(instance, nodes, OPTIONS)
    if again is None:
        return
    assert [part.shard.layer_start for part in again.parts] == [0, *(part.shard.layer_end for part in again.parts[:-1])]
    assert again.parts[-1].shard.layer_end == COUNT
    found = {part.node_id: part for part in again.parts}
    for stage in here:
        part = found[stage.node_id]
        assert part.shard.layer_start <= stage.shard.layer_start < stage.shard.layer_end <= part.shard.layer_end
    for part in again.parts:
        count_bytes = rooms.get(part.node_id, spare) * GIGABYTE
        assert part.memory_bytes == shard_bytes(LOAD, part.shard) <= count_bytes * 0.9


def test_anew_the_nodes_stay_in_the_order_that_moves_least() -> None:
    """By itself the placement would begin with the node of most memory."""
    wide = replace(OPTIONS, node_count_min=3)
    anew = place_anew(former(8, 24), [node("a", 50), node("b", 60), node("x", 70)], wide)
    assert isinstance(anew, Placement)
    assert [part.node_id for part in anew.parts] == ["a", "x", "b"]


def test_anew_what_does_not_fit_is_refused() -> None:
    refused = place_anew(former(8, 24), [node("a", 1)], OPTIONS)
    assert isinstance(refused, Refused)
