"""Placing a model with a draft, which its head holds, too: what that takes, what is refused, where it goes later."""

from typing import Any

import msgspec
import pytest
from candidates import node, nodes
from hypothesis import given, settings
from hypothesis import strategies as some
from msgspec.structs import replace

from covey.control.cluster import Cluster, Context, Decision, assignment, encoded, options_of, wish_asked_for
from covey.control.placement.again import place_again, place_anew, place_at_all
from covey.control.placement.memory import (
    PROGRAM_BYTES,
    Load,
    draft_bytes,
    overhead_bytes,
    shard_bytes,
    whole_bytes,
)
from covey.control.placement.nodes import budgets_bytes
from covey.control.placement.place import Options, Placement, group_budgets_bytes, place
from covey.control.placement.split import split
from covey.schema.cluster import Accepted, Instance, PlaceModel, Refused, Wish
from covey.schema.ids import ModelId, NodeId
from covey.schema.model import FileSource, KvCacheType, ModelCard, QuantizedBytes, Quantizing, Shard, SparedBytes

MB = 10**6


def card(name: str, layers: tuple[int, ...], **changes: Any) -> ModelCard:
    model = ModelCard(
        model_id=ModelId(name),
        source=FileSource(f"/{name}.gguf"),
        architecture="llama",
        quantization="Q4_1",
        layer_count=len(layers),
        hidden_size=512,
        attention_head_count=8,
        kv_head_count=2,
        head_size=64,
        feed_forward_size=1536,
        vocabulary_size=49152,
        context_length_max=8192,
        file_bytes=sum(layers),
        layer_bytes=layers,
        embedding_bytes=30 * MB,
        output_bytes=30 * MB,
    )
    return replace(model, **changes)


MODEL = card("model", (100 * MB,) * 12)
DRAFT = card("draft", (10 * MB,) * 4, embedding_bytes=20 * MB, output_bytes=20 * MB)
SIZES = Options(context_length=512, slot_count=1, draft=DRAFT)
LOAD = Load(MODEL, 512, 1, draft=DRAFT)


def room_for(start: int, end: int, load: Load = LOAD) -> int:
    """Free memory that a placement takes just this for: a tenth stays with the owner."""
    return shard_bytes(load, Shard(start, end, 12)) * 10 // 9 + 2


def layout(placed: Placement | Refused | None) -> list[tuple[str, int, int]]:
    assert isinstance(placed, Placement), placed
    return [(each.node_id, each.shard.layer_start, each.shard.layer_end) for each in placed.parts]


def instance(placed: Placement | Refused, command: PlaceModel | None = None) -> Instance:
    assert isinstance(placed, Placement), placed
    context = Context(command_id="w", asked_at=None, instance_mark="1", engine="fake", nodes=tuple(nodes("abcdef")))
    wish = wish_asked_for(command or PlaceModel(card=MODEL, draft=DRAFT), placed, "w")
    return assignment(wish, placed, context)


# ---- what it takes ----


def test_the_head_has_room_for_the_whole_draft_in_one_slot_and_without_a_second_program() -> None:
    cache = 4 * (2 * 2 * 64 * 4) * 512  # layers; keys and values of two heads of 64 floats; tokens
    scores = 8 * 128 * 512 * 4  # heads; the tokens of a step; those before; floats
    assert draft_bytes(LOAD) == 80 * MB + cache + scores
    assert overhead_bytes(Load(DRAFT, 512, 1)) == PROGRAM_BYTES + scores
    with_draft, without = [shard_bytes(each, Shard(0, 6, 12)) for each in (LOAD, replace(LOAD, draft=None))]
    assert with_draft - without == draft_bytes(LOAD)
    assert shard_bytes(LOAD, Shard(6, 12, 12)) == shard_bytes(replace(LOAD, draft=None), Shard(6, 12, 12))


@pytest.mark.parametrize("changes", [{"slot_count": 4}, {"exact": True}])
def test_neither_slots_nor_exact_mode_change_anything_of_the_draft(changes: dict[str, Any]) -> None:
    """It is not exact, and guesses for one request at a time."""
    load = replace(LOAD, draft=replace(DRAFT, spared=SparedBytes((MB,) * 4, MB)))
    assert draft_bytes(replace(load, **changes)) == draft_bytes(load)


def test_a_draft_in_full_precision_is_counted_as_it_is_rounded_with_the_model() -> None:
    small = QuantizedBytes(Quantizing.Q4, (3 * MB,) * 4, 5 * MB, 5 * MB)
    load = replace(LOAD, draft=replace(DRAFT, quantized=(small,)), quantize=Quantizing.Q4)
    assert draft_bytes(load) == draft_bytes(LOAD) - 80 * MB + 22 * MB
    assert draft_bytes(replace(load, quantize=Quantizing.Q8)) == draft_bytes(LOAD), "it has nothing to round so"


@pytest.mark.parametrize("rank_count", [1, 2])
@pytest.mark.parametrize("node_count", [2, 4])
def test_what_a_placement_counts_is_what_was_looked_for_in_all(rank_count: int, node_count: int) -> None:
    placed = place(MODEL, nodes("abcd"), replace(SIZES, rank_count=rank_count, node_count_min=node_count))
    assert isinstance(placed, Placement)
    load = replace(LOAD, rank_count=rank_count)
    assert sum(part.memory_bytes for part in placed.parts) == whole_bytes(load, node_count // rank_count)


def test_of_ranks_that_share_the_first_layers_one_holds_the_draft_and_each_has_room_for_it() -> None:
    """Groups are as large as their least node, so they are cut as if any rank could be the head."""
    placed = place(MODEL, nodes("ab"), replace(SIZES, rank_count=2))
    assert isinstance(placed, Placement)
    head, other = placed.parts
    assert head.memory_bytes - other.memory_bytes == draft_bytes(LOAD)
    tight = [node("a", head.memory_bytes * 10 // 9 + 2), node("b", other.memory_bytes * 10 // 9 + 2)]
    assert isinstance(place(MODEL, tight, replace(SIZES, rank_count=2)), Refused)


@settings(max_examples=60, deadline=None)
@given(frees=some.lists(some.integers(150, 1500), min_size=1, max_size=5), rank_count=some.sampled_from((1, 2)))
def test_no_node_is_given_more_than_it_has(frees: list[int], rank_count: int) -> None:
    all_nodes = [node(str(number), free * MB) for number, free in enumerate(frees)]
    placed = place(MODEL, all_nodes, replace(SIZES, rank_count=rank_count))
    if isinstance(placed, Refused):
        return
    by_id = {each.node_id: each for each in all_nodes}
    used = [by_id[part.node_id] for part in placed.parts]
    for part, budget in zip(placed.parts, budgets_bytes(all_nodes, used), strict=True):
        assert part.memory_bytes <= budget
    groups = [used[start : start + rank_count] for start in range(0, len(used), rank_count)]
    assert split(replace(LOAD, rank_count=rank_count), group_budgets_bytes(all_nodes, groups))


def test_without_room_for_it_at_one_end_another_node_is_the_head() -> None:
    all_nodes = [node("a", room_for(11, 12)), node("b", room_for(0, 11))]
    assert layout(place(MODEL, all_nodes, replace(SIZES, asked_at=NodeId("a")))) == [("b", 0, 11), ("a", 11, 12)]


# ---- what is refused ----


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_id": ModelId("model")}, "model can't be its own draft"),
        ({"source": MODEL.source}, "model can't be its own draft"),
        ({"vocabulary_size": 50_177}, "it knows 50177 tokens and that 49152, so they are of different families"),
        ({"vocabulary_size": 32_000}, "Name a smaller model of the same family"),
        ({"layer_bytes": (150 * MB,) * 4}, "draft as a draft for model would not be faster"),
        ({"layer_count": 5}, "the card of draft names 5 layers and the sizes of 4"),
        ({"layer_count": 0, "layer_bytes": ()}, "the card of draft names 0 layers"),
        ({"context_length_max": 511}, "the draft draft holds a context of 511 tokens at most"),
    ],
)
def test_what_can_not_guess_is_refused_with_the_reason(changes: dict[str, Any], words: str) -> None:
    refused = place(MODEL, nodes("ab"), replace(SIZES, draft=replace(DRAFT, **changes)))
    assert isinstance(refused, Refused)
    assert words in refused.reason
    assert refused.status == 400


def test_a_vocabulary_that_is_padded_otherwise_is_of_the_same_family() -> None:
    padded = replace(DRAFT, vocabulary_size=49152 + 1024)
    assert isinstance(place(MODEL, nodes("a"), replace(SIZES, draft=padded)), Placement)


def test_what_is_half_as_large_counts_as_both_are_held() -> None:
    model = replace(MODEL, quantized=(QuantizedBytes(Quantizing.Q4, (10 * MB,) * 12, MB, MB),))
    assert isinstance(place(model, nodes("a"), SIZES), Placement)
    refused = place(model, nodes("a"), replace(SIZES, quantize=Quantizing.Q4))
    assert isinstance(refused, Refused)
    assert "would not be faster" in refused.reason
    rounded = replace(DRAFT, quantized=(QuantizedBytes(Quantizing.Q4, (MB,) * 4, MB, MB),))
    both = replace(SIZES, quantize=Quantizing.Q4, draft=rounded)
    assert isinstance(place(model, nodes("a"), both), Placement), "the draft is rounded, too"


def test_who_asks_for_no_context_gets_no_more_than_the_draft_holds() -> None:
    short = replace(DRAFT, context_length_max=2048)
    placed = place(MODEL, nodes("a"), Options(draft=short))
    assert isinstance(placed, Placement)
    assert placed.context_length == 2048
    assert isinstance(place(MODEL, nodes("a"), Options(draft=replace(DRAFT, context_length_max=0))), Refused)


@pytest.mark.parametrize(
    ("free", "slot_count", "words"),
    [
        (
            room_for(0, 12) - 40 * MB,
            1,
            "Without the draft it would fit; else free memory",
        ),
        (
            room_for(0, 12, replace(LOAD, slot_count=64, kv_cache=KvCacheType.F16)),
            64,
            "With 32 slots, or with a KV cache in 16-bit floats",
        ),
        (room_for(0, 12, replace(LOAD, draft=None)), 16, "Without the draft, and with 1 slot, it would fit; else"),
        (room_for(0, 12, replace(LOAD, draft=None)) - MB, 16, "Free memory, add a node, or choose a smaller model."),
    ],
)
def test_too_little_memory_says_whether_it_would_fit_without_the_draft(free: int, slot_count: int, words: str) -> None:
    refused = place(MODEL, [node("a", free)], replace(SIZES, slot_count=slot_count))
    assert isinstance(refused, Refused)
    assert refused.reason.startswith("model with draft as its draft needs 1.")
    assert words in refused.reason
    assert refused.status == 409


# ---- what was asked for, and what is stored ----


def carry_out(cluster: Cluster, command: PlaceModel) -> Instance:
    context = Context(command_id="w", asked_at=None, instance_mark="1", engine="fake", nodes=tuple(nodes("ab")))
    decision = cluster.decide(command, context)
    assert isinstance(decision, Decision)
    assert isinstance(decision.outcome, Accepted)
    cluster.apply(decision.events)
    [made] = cluster.instances.values()
    return made


def test_the_draft_goes_from_the_command_to_the_instance_and_where_that_is_placed_again() -> None:
    cluster = Cluster(NodeId("a"))
    made = carry_out(cluster, PlaceModel(card=MODEL, draft=DRAFT))
    wish = cluster.wishes[made.wish_id]
    assert (wish.draft, made.draft) == (DRAFT, DRAFT)
    assert options_of(wish, nodes("ab")).draft == DRAFT


@pytest.mark.parametrize("value", [Wish, Instance])
def test_versions_that_know_drafts_and_those_that_do_not_read_one_another(value: type[Wish | Instance]) -> None:
    cluster = Cluster(NodeId("a"))
    made = carry_out(cluster, PlaceModel(card=MODEL, draft=DRAFT))
    mine = cluster.wishes[made.wish_id] if value is Wish else made
    fields = [(each.name, each.type) for each in msgspec.structs.fields(value) if each.name != "draft"]
    older = msgspec.defstruct(value.__name__, fields, frozen=True, kw_only=True, tag=value.__struct_config__.tag)
    read = msgspec.msgpack.decode(encoded(mine) or b"", type=older)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(read), type=value) == replace(mine, draft=None)


# ---- after a loss ----


def three() -> Instance:
    return instance(place(MODEL, nodes("abc"), replace(SIZES, node_count_min=3)))


def test_the_draft_is_counted_where_the_first_layers_go_when_the_head_is_lost() -> None:
    again = place_again(three(), nodes("bc"), SIZES)
    assert layout(again)[0][:2] == ("b", 0)
    assert again is not None
    assert again.parts[0].memory_bytes == shard_bytes(LOAD, again.parts[0].shard)
    alone = place_again(three(), [node("b", room_for(0, 12) - 2 * draft_bytes(LOAD))], SIZES)
    assert alone is None


def test_after_a_loss_the_model_goes_on_without_its_draft_rather_than_not_at_all() -> None:
    tight = [node("b", room_for(0, 12, replace(LOAD, draft=None)))]
    assert isinstance(place(MODEL, tight, SIZES), Refused), "who asks for it anew is told"
    placed = place_at_all(MODEL, tight, SIZES)
    assert layout(placed) == [("b", 0, 12)]
    assert instance(placed).draft is None
    with_room = place_at_all(MODEL, nodes("b"), SIZES)
    assert instance(with_room).draft == DRAFT
    assert isinstance(place_at_all(MODEL, [node("b", 500 * MB)], SIZES), Refused)


def test_another_rank_that_takes_the_place_of_the_head_has_room_for_the_draft() -> None:
    two = replace(SIZES, rank_count=2)
    before = instance(place(MODEL, nodes("ab"), two), PlaceModel(card=MODEL, draft=DRAFT, rank_count=2))
    needed = [stage.memory_bytes * 10 // 9 + 2 for stage in before.stages]
    assert place_again(before, [node("b"), node("e", needed[1])], two) is None
    again = place_again(before, [node("b"), node("e", needed[0])], two)
    assert again is not None
    assert [(part.node_id, part.rank) for part in again.parts] == [("e", 0), ("b", 1)]


def test_placed_anew_the_head_stays_where_the_draft_is() -> None:
    before = instance(place(MODEL, nodes("b"), SIZES))
    wide = replace(SIZES, node_count_min=2)
    assert layout(place(MODEL, nodes("ab"), wide))[0][0] == "a"
    assert layout(place_anew(before, nodes("ab"), wide))[0][0] == "b"
