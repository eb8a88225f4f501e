"""Placing a model whose layers several nodes are to share: who shares with whom, what it costs, and what is refused."""

from itertools import pairwise
from typing import Any

import msgspec
import pytest
from candidates import node, nodes
from hypothesis import given, settings
from hypothesis import strategies as some
from msgspec.structs import replace

from covey.control.cluster import Context, assignment, options_of
from covey.control.placement.again import place_again, place_anew, place_at_all
from covey.control.placement.memory import Load, layer_bytes, shard_bytes, whole_bytes
from covey.control.placement.nodes import budgets_bytes
from covey.control.placement.place import Options, Placement, place
from covey.schema.cluster import Instance, Refused, Stage, Wish
from covey.schema.ids import ModelId, NodeId
from covey.schema.model import FileSource, ModelCard, Shard
from covey.schema.pipeline import is_regular, leaders, ranks_of, stage_count

MB = 10**6


def card(**changes: Any) -> ModelCard:
    """12 layers, of which 2, 4 and 8 ranks can have a share each; more than 2 have the same key-value heads."""
    model = ModelCard(
        model_id=ModelId("model"),
        source=FileSource("/model.gguf"),
        architecture="llama",
        quantization="Q4_1",
        layer_count=12,
        hidden_size=512,
        attention_head_count=8,
        kv_head_count=2,
        head_size=64,
        feed_forward_size=1536,
        vocabulary_size=49152,
        context_length_max=8192,
        file_bytes=12 * 100 * MB,
        layer_bytes=(100 * MB,) * 12,
        embedding_bytes=30 * MB,
        output_bytes=30 * MB,
    )
    return replace(model, **changes)


def shared(rank_count: int, **changes: Any) -> Options:
    return Options(context_length=512, slot_count=1, rank_count=rank_count, **changes)


def layout(placed: Placement | Refused) -> list[tuple[str, int, int, int]]:
    """(node, first layer, end, rank) of each runner."""
    assert isinstance(placed, Placement), placed
    return [(each.node_id, each.shard.layer_start, each.shard.layer_end, each.rank) for each in placed.parts]


def instance(placed: Placement | Refused, rank_count: int) -> Instance:
    assert isinstance(placed, Placement), placed
    wish = wished(rank_count)
    context = Context(
        command_id="w",
        asked_at=None,
        instance_mark="1",
        engine="fake",
        nodes=tuple(node(part.node_id) for part in placed.parts),
    )
    return assignment(wish, placed, context)


def wished(rank_count: int, node_count_min: int = 1) -> Wish:
    return Wish(
        wish_id="w",
        card=card(),
        node_count_min=node_count_min,
        context_length=512,
        slot_count=1,
        rank_count=rank_count,
    )


# ---- who shares with whom ----


def test_two_ranks_hold_all_layers_together() -> None:
    placed = place(card(), nodes("ab"), shared(2))
    assert layout(placed) == [("a", 0, 12, 0), ("b", 0, 12, 1)]
    made = instance(placed, 2)
    assert (made.rank_count, stage_count(made), [stage.rank for stage in made.stages]) == (2, 1, [0, 1])
    assert is_regular(made)


def test_two_by_two_are_a_pipeline_of_two_stages() -> None:
    placed = place(card(), nodes("abcd"), shared(2, node_count_min=4))
    assert layout(placed) == [("a", 0, 8, 0), ("b", 0, 8, 1), ("c", 8, 12, 0), ("d", 8, 12, 1)]
    made = instance(placed, 2)
    assert [stage.node_id for stage in leaders(made)] == ["a", "c"]
    assert list(ranks_of(made, 1)) == [2, 3]


def test_the_node_that_asked_is_the_head() -> None:
    placed = place(card(), nodes("abcd"), shared(2, node_count_min=4, asked_at=NodeId("d")))
    assert layout(placed)[0] == ("d", 0, 8, 0)


def test_nodes_of_one_machine_share_layers_with_one_another() -> None:
    """Ranks talk for each half of a layer, stages once a step."""
    all_nodes = [node("a", machine="x"), node("b", machine="y"), node("c", machine="x"), node("d", machine="y")]
    placed = place(card(), all_nodes, shared(2, node_count_min=4))
    assert isinstance(placed, Placement)
    first, second = placed.parts[:2], placed.parts[2:]
    assert {frozenset(each.node_id for each in group) for group in (first, second)} == {
        frozenset("ac"),
        frozenset("bd"),
    }


def test_nodes_with_much_the_same_memory_share_layers_where_there_is_no_other_way() -> None:
    """A group has room for what its smallest has room for: with a big and a small one in each, nothing would fit."""
    small, big = 350 * MB, 1400 * MB
    all_nodes = [node("a", small), node("b", big), node("c", big), node("d", small)]
    placed = place(card(), all_nodes, shared(2, node_count_min=4, asked_at=NodeId("a")))
    assert isinstance(placed, Placement)
    pairs = [{part.node_id for part in placed.parts[start : start + 2]} for start in (0, 2)]
    assert {"a", "d"} in pairs


def test_as_few_stages_as_hold_it_are_used() -> None:
    roomy = place(card(), nodes("abcd"), shared(2))
    assert len(layout(roomy)) == 2
    tight = place(card(), nodes("abcd", free=750 * MB), shared(2))
    assert len(layout(tight)) == 4


@settings(max_examples=150, deadline=None)
@given(
    frees=some.lists(some.integers(150, 1800), min_size=2, max_size=5),
    rank_count=some.sampled_from((1, 2, 4)),
    machine_count=some.integers(2, 5),
)
def test_whatever_is_placed_fits_and_covers_each_layer_with_each_rank(
    frees: list[int], rank_count: int, machine_count: int
) -> None:
    all_nodes = [
        replace(node(f"n{index}", free * MB), machine_id=f"m{index % machine_count}")
        for index, free in enumerate(frees)
    ]
    placed = place(card(), all_nodes, shared(rank_count))
    if isinstance(placed, Refused):
        return
    chosen = [each for part in placed.parts for each in all_nodes if each.node_id == part.node_id]
    assert len({part.node_id for part in placed.parts}) == len(placed.parts)
    for part, budget in zip(placed.parts, budgets_bytes(all_nodes, chosen), strict=True):
        assert part.memory_bytes <= budget
    groups = [placed.parts[start : start + rank_count] for start in range(0, len(placed.parts), rank_count)]
    for group in groups:
        assert [part.rank for part in group] == list(range(rank_count))
        assert len({part.shard for part in group}) == 1
    assert groups[0][0].shard.layer_start == 0
    assert groups[-1][0].shard.layer_end == 12
    assert all(before[0].shard.layer_end == after[0].shard.layer_start for before, after in pairwise(groups))


# ---- what it costs ----


def test_a_rank_is_counted_no_less_than_its_share_and_hardly_more() -> None:
    alone, half = Load(card(), 512, 1), Load(card(), 512, 1, rank_count=2)
    assert layer_bytes(alone, 0) // 2 <= layer_bytes(half, 0) <= layer_bytes(alone, 0) * 53 // 100
    whole = Shard(0, 12, 12)
    assert shard_bytes(half, whole) < shard_bytes(alone, whole)
    assert whole_bytes(half, 1) == 2 * shard_bytes(half, whole)


def test_ranks_that_have_the_same_key_value_head_are_counted_with_it() -> None:
    """8 ranks of 2 such heads: each rank has a whole one, four times its even share."""
    load = Load(card(feed_forward_size=16), 512, 1, rank_count=8)
    even = -(-100 * MB // 8)
    assert layer_bytes(load, 0) > even * 13 // 10


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "count", "status", "reason"),
    [
        (shared(4), 2, 409, "4 ranks need 4 nodes, only 2 are here: run `covey up` on 2 more devices"),
        (shared(2, node_count_min=3), 4, 400, "3 nodes can't be divided into stages of 2 ranks"),
        (shared(4, node_count_min=2), 4, 400, "2 nodes can't be divided into stages of 4 ranks"),
        (shared(2, node_count_min=4), 2, 409, "asked for 4 nodes, only 2 are here"),
        (shared(3), 4, 400, "can't be cut into 3 ranks; possible is 2 or 4 or 8"),
        (shared(0), 4, 400, "by 0 ranks: ask for a number from 1 to 64"),
        (shared(-2), 4, 400, "by -2 ranks"),
        (shared(65), 4, 400, "by 65 ranks"),
        (shared(2, node_count_min=26), 26, 400, "has only 12 layers"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_the_reason(
    options: Options, count: int, status: int, reason: str
) -> None:
    refused = place(card(), nodes("abcdefghijklmnopqrstuvwxyz"[:count]), options)
    assert isinstance(refused, Refused)
    assert reason in refused.reason
    assert refused.status == status


def test_too_little_memory_says_how_much_all_ranks_need() -> None:
    refused = place(card(), nodes("ab", free=400 * MB), shared(2))
    assert isinstance(refused, Refused)
    assert "on 2 nodes" in refused.reason


# ---- after a loss ----


def test_another_node_takes_the_place_of_a_lost_rank() -> None:
    before = instance(place(card(), nodes("abcd"), shared(2, node_count_min=4)), 2)
    again = place_again(before, nodes("acde"), shared(2, node_count_min=4))
    assert again is not None
    assert layout(again) == [("a", 0, 8, 0), ("e", 0, 8, 1), ("c", 8, 12, 0), ("d", 8, 12, 1)]


def test_a_spare_node_without_room_takes_no_place() -> None:
    before = instance(place(card(), nodes("ab"), shared(2)), 2)
    assert place_again(before, [node("a"), node("e", 300 * MB)], shared(2)) is None


def test_with_too_few_nodes_left_it_is_placed_with_fewer_ranks() -> None:
    """Rather than not at all: whoever waits for an answer gets it."""
    before = instance(place(card(), nodes("ab"), shared(2)), 2)
    options = options_of(wished(2), nodes("a"))
    assert options.rank_count == 1
    assert place_again(before, nodes("a"), options) is None
    assert layout(place_at_all(card(), nodes("a"), options)) == [("a", 0, 12, 0)]
    assert options_of(wished(8), nodes("abc")).rank_count == 2
    assert options_of(wished(2, 4), nodes("abc")) == replace(options_of(wished(2), nodes("abc")), node_count_min=2)


def test_ranks_that_find_no_room_give_way_to_fewer() -> None:
    """One node is big enough for all, the other too small even for half."""
    all_nodes = [node("a"), node("b", 300 * MB)]
    assert isinstance(place(card(), all_nodes, shared(2)), Refused)
    assert layout(place_at_all(card(), all_nodes, shared(2))) == [("a", 0, 12, 0)]


def test_placed_anew_each_node_keeps_its_rank() -> None:
    before = instance(place(card(), nodes("ab"), shared(2, asked_at=NodeId("b"))), 2)
    assert [stage.node_id for stage in before.stages] == ["b", "a"]
    assert layout(place_anew(before, nodes("ab"), shared(2))) == [("b", 0, 12, 0), ("a", 0, 12, 1)]


# ---- what is stored ----


def test_what_an_older_version_stored_has_one_rank() -> None:
    made = instance(place(card(), nodes("ab"), Options(node_count_min=2, context_length=512, slot_count=1)), 1)
    stored = msgspec.to_builtins(made)
    del stored["rank_count"]
    for stage in stored["stages"]:
        del stage["rank"]
    assert msgspec.convert(stored, Instance) == made
    wish = msgspec.to_builtins(wished(1))
    del wish["rank_count"]
    assert msgspec.convert(wish, Wish) == wished(1)


def test_an_instance_of_an_odd_number_of_ranks_is_not_understood() -> None:
    made = instance(place(card(), nodes("ab"), shared(2)), 2)
    assert not is_regular(replace(made, stages=made.stages[:1]))
    assert not is_regular(replace(made, rank_count=0))
    assert isinstance(made.stages[0], Stage)
