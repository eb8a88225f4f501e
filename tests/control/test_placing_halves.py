"""A KV cache in 16-bit floats: what it takes, where a refusal names it, how far the wish for it travels."""

import msgspec
import pytest
from candidates import node, nodes
from msgspec.structs import replace
from test_placing_drafts import DRAFT, MB, MODEL, carry_out, instance

from covey.control.cluster import Cluster, encoded, options_of
from covey.control.companions import is_alike
from covey.control.placement.again import load_of, place_again, place_anew
from covey.control.placement.memory import Load, draft_bytes, kv_bytes_of_layer, shard_bytes
from covey.control.placement.place import Options, Placement, place
from covey.schema.cluster import Instance, PlaceModel, Refused, Wish
from covey.schema.ids import NodeId
from covey.schema.model import KvCacheType, ModelCard, Shard

WHOLE = Shard(0, 12, 12)
LONG = Options(context_length=8192, slot_count=4)
LOAD = Load(MODEL, 8192, 4)
HALVED = replace(LOAD, kv_cache=KvCacheType.F16)
ASKED = replace(LONG, kv_cache=KvCacheType.F16)
TIGHT = node("a", shard_bytes(HALVED, WHOLE) * 10 // 9 + 2)  # free memory for just this; a tenth stays with the owner


def widened(card: ModelCard) -> int:
    """Keys of some heads, in 32 bits, beside the cache."""
    return min(card.attention_head_count, 8) * card.head_size * 8192 * 4


def test_keys_and_values_take_half_the_bytes_and_some_keys_are_widened_beside_them() -> None:
    assert kv_bytes_of_layer(LOAD) == 2 * 2 * 64 * 4 * 8192 * 4  # keys and values of two heads of 64 floats
    assert kv_bytes_of_layer(HALVED) * 2 == kv_bytes_of_layer(LOAD)
    spared = shard_bytes(LOAD, WHOLE) - shard_bytes(HALVED, WHOLE)
    assert spared == 12 * kv_bytes_of_layer(HALVED) - widened(MODEL)


def test_a_draft_follows() -> None:
    cache = 4 * 2 * 2 * 64 * 2 * 8192  # four layers, in one slot
    assert draft_bytes(replace(LOAD, draft=DRAFT)) - draft_bytes(replace(HALVED, draft=DRAFT)) == cache - widened(DRAFT)


def test_it_fits_where_floats_do_not() -> None:
    assert isinstance(place(MODEL, [TIGHT], LONG), Refused)
    placed = place(MODEL, [TIGHT], ASKED)
    assert isinstance(placed, Placement)
    assert [part.memory_bytes for part in placed.parts] == [shard_bytes(HALVED, WHOLE)]


def reason(options: Options, free: int) -> str:
    refused = place(MODEL, [node("a", free)], options)
    assert isinstance(refused, Refused)
    return refused.reason


def test_a_refusal_names_it_where_it_is_a_way_out() -> None:
    free = TIGHT.memory_bytes_free
    both = "With 2 slots, or with a KV cache in 16-bit floats (`--kv-cache f16`), it would fit; else free memory"
    assert both in reason(LONG, free)
    one = replace(LONG, context_length=1024, slot_count=1)
    alone = shard_bytes(replace(HALVED, context_length=1024, slot_count=1), WHOLE) * 10 // 9 + 2
    assert ". With a KV cache in 16-bit floats (`--kv-cache f16`) it would fit; else free" in reason(one, alone)


def test_a_refusal_does_not_name_it_where_it_is_none() -> None:
    assert "--kv-cache" not in reason(LONG, TIGHT.memory_bytes_free - 40 * MB)
    assert "With 2 slots it would fit" in reason(ASKED, TIGHT.memory_bytes_free - 40 * MB)


def test_the_wish_for_it_goes_from_the_command_to_the_instance_and_where_that_is_placed_again() -> None:
    cluster = Cluster(NodeId("a"))
    made = carry_out(cluster, PlaceModel(card=MODEL, kv_cache=KvCacheType.F16))
    wish = cluster.wishes[made.wish_id]
    assert (wish.kv_cache, made.kv_cache) == (KvCacheType.F16, KvCacheType.F16)
    assert options_of(wish, nodes("ab")).kv_cache is KvCacheType.F16
    assert load_of(made, 512, 1).kv_cache is KvCacheType.F16


def test_placed_again_it_has_no_more_room_than_it_needs() -> None:
    before = instance(
        place(MODEL, nodes("ab"), replace(ASKED, node_count_min=2)), PlaceModel(card=MODEL, kv_cache=KvCacheType.F16)
    )
    for placed in (place_again(before, [TIGHT], ASKED), place_anew(before, [TIGHT], ASKED)):
        assert isinstance(placed, Placement)
        assert [part.memory_bytes for part in placed.parts] == [shard_bytes(HALVED, WHOLE)]


def test_what_is_loaded_with_the_one_type_does_not_serve_the_other() -> None:
    before = instance(place(MODEL, nodes("a"), LONG))
    assert is_alike(before, replace(before))
    assert not is_alike(before, replace(before, kv_cache=KvCacheType.F16))


@pytest.mark.parametrize("value", [Wish, Instance])
def test_versions_that_know_it_and_those_that_do_not_read_one_another(value: type[Wish | Instance]) -> None:
    cluster = Cluster(NodeId("a"))
    made = carry_out(cluster, PlaceModel(card=MODEL, kv_cache=KvCacheType.F16))
    mine = cluster.wishes[made.wish_id] if value is Wish else made
    fields = [(each.name, each.type) for each in msgspec.structs.fields(value) if each.name != "kv_cache"]
    older = msgspec.defstruct(value.__name__, fields, frozen=True, kw_only=True, tag=value.__struct_config__.tag)
    read = msgspec.msgpack.decode(encoded(mine) or b"", type=older)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(read), type=value) == replace(mine, kv_cache=KvCacheType.F32)
