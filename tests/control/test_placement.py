"""Placement against a dumb twin, and its refusals in words."""

from fractions import Fraction
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from covey.control.placement import memory
from covey.control.placement.memory import Load, shard_bytes
from covey.control.placement.nodes import Candidate, budgets_bytes
from covey.control.placement.place import Options, Placement, place
from covey.control.placement.split import split
from covey.schema.cluster import Refused
from covey.schema.ids import ModelId, NodeId
from covey.schema.model import FileSource, ModelCard, QuantizedBytes, Quantizing, Shard, SparedBytes

MB = 10**6
GB = 10**9


def card(layers: tuple[int, ...], embedding: int = 30 * MB, output: int = 30 * MB, trained: int = 8192) -> ModelCard:
    return ModelCard(
        model_id=ModelId("model"),
        source=FileSource("/model.gguf"),
        architecture="llama",
        quantization="Q4_1",
        layer_count=len(layers),
        hidden_size=576,
        attention_head_count=9,
        kv_head_count=3,
        head_size=64,
        feed_forward_size=1536,
        vocabulary_size=49152,
        context_length_max=trained,
        file_bytes=sum(layers) + embedding,
        layer_bytes=layers,
        embedding_bytes=embedding,
        output_bytes=output,
    )


def node(name: str, free: int, machine: str | None = None, promised: int = 0, held: int = 0) -> Candidate:
    return Candidate(
        node_id=NodeId(f"id-{name}"),
        name=name,
        machine_id=machine or f"machine-{name}",
        memory_bytes_total=2 * free,
        memory_bytes_free=free,
        memory_bytes_promised=promised,
        memory_bytes_held=held,
    )


def layout(placed: Placement | Refused) -> list[tuple[str, int]]:
    """(node, number of layers) of each stage."""
    assert isinstance(placed, Placement), placed
    return [(part.node_id.removeprefix("id-"), part.shard.layer_end - part.shard.layer_start) for part in placed.parts]


def reason(placed: Placement | Refused) -> str:
    assert isinstance(placed, Refused), placed
    return placed.reason


# ---- split, against every possible split ----


def all_splits(layer_count: int, stage_count: int) -> list[tuple[int, ...]]:
    return [(*cuts, layer_count) for cuts in combinations(range(1, layer_count), stage_count - 1)]


def fits(load: Load, cuts: tuple[int, ...], budgets: tuple[int, ...]) -> bool:
    starts = (0, *cuts)
    shards = [Shard(start, end, load.card.layer_count) for start, end in zip(starts, cuts, strict=False)]
    return all(shard_bytes(load, shard) <= budget for shard, budget in zip(shards, budgets, strict=True))


def proportional(load: Load, budgets: tuple[int, ...]) -> tuple[int, ...]:
    """By the work: a layer's rows of weights, and half of the vocabulary's with the last."""
    layers = [2 * 64 * 12 + 3 * 1536] * load.card.layer_count
    layers[-1] += 49152 // 2
    shares = [Fraction(sum(budgets[: stage + 1]), sum(budgets)) for stage in range(len(budgets))]
    return tuple(
        min(range(len(layers) + 1), key=lambda cut, share=share: (abs(sum(layers[:cut]) - share * sum(layers)), cut))
        for share in shares
    )


@settings(max_examples=300, deadline=None)
@given(
    layers=st.lists(st.integers(1, 120), min_size=1, max_size=8),
    ends=st.tuples(st.integers(0, 200), st.integers(0, 200)),
    rooms=st.lists(st.integers(0, 900), min_size=1, max_size=4),
)
def test_split_finds_a_split_exactly_when_there_is_one(
    layers: list[int], ends: tuple[int, int], rooms: list[int]
) -> None:
    model = card(tuple(size * MB for size in layers), ends[0] * MB, ends[1] * MB)
    load = Load(model, 64, 1)
    budgets = tuple(memory.overhead_bytes(load) + room * MB for room in rooms)
    possible = [cuts for cuts in all_splits(len(layers), len(rooms)) if fits(load, cuts, budgets)]
    found = split(load, budgets)
    assert (found in possible) if possible else (found is None)
    if proportional(load, budgets) in possible:
        assert found == proportional(load, budgets)


# ---- place, against every set of nodes in every order of its ends ----


@settings(max_examples=150, deadline=None)
@given(
    frees=st.lists(st.integers(100, 1500), min_size=1, max_size=4),
    machines=st.lists(st.sampled_from("ab"), min_size=4, max_size=4),
    shares=st.booleans(),
    least=st.integers(1, 3),
)
def test_place_uses_the_fewest_nodes_that_hold_the_model(
    frees: list[int], machines: list[str], least: int, *, shares: bool
) -> None:
    model = card((80 * MB,) * 6)
    nodes = [node(str(n), free * MB, machines[n] if shares else None) for n, free in enumerate(frees)]
    options = Options(node_count_min=least, context_length=256, slot_count=1)
    load = Load(model, 256, 1)
    counts = [
        count
        for count in range(least, len(nodes) + 1)
        for used in combinations(nodes, count)
        if split(load, budgets_bytes(nodes, used)) is not None
    ]
    placed = place(model, nodes, options)
    if isinstance(placed, Placement):
        assert len(placed.parts) <= min(counts, default=99)  # another order may even do with fewer
        check(placed, nodes, model)
    else:
        assert not counts


def check(placed: Placement, nodes: list[Candidate], model: ModelCard) -> None:
    """Every layer once, in order; each stage within what its machine can give."""
    ends = [0, *(part.shard.layer_end for part in placed.parts)]
    assert [part.shard.layer_start for part in placed.parts] == ends[:-1]
    assert ends[-1] == model.layer_count
    by_id = {each.node_id: each for each in nodes}
    for machine in {each.machine_id for each in nodes}:
        taken = sum(part.memory_bytes for part in placed.parts if by_id[part.node_id].machine_id == machine)
        free = min(each.memory_bytes_free for each in nodes if each.machine_id == machine)
        assert taken <= free * memory.USABLE_PERCENT // 100


def test_the_order_of_nodes_does_not_matter() -> None:
    nodes = [node("a", 2 * GB), node("b", 2 * GB), node("c", 1 * GB)]
    options = Options(node_count_min=2)
    assert place(card((MB,) * 30), nodes, options) == place(card((MB,) * 30), nodes[::-1], options)


# ---- what people get ----


def test_one_node_is_enough_for_a_small_model() -> None:
    placed = place(card((2 * MB,) * 30), [node("small", 4 * GB), node("large", 16 * GB)], Options())
    assert layout(placed) == [("large", 30)]


def test_a_large_model_finds_its_place_among_many_small_nodes() -> None:
    nodes = [node(f"n{number:02}", 6 * GB) for number in range(16)]
    placed = place(card((625 * MB,) * 80), nodes, Options(context_length=1024))
    assert len(layout(placed)) == 10


def test_two_nodes_on_one_machine_divide_its_memory() -> None:
    nodes = [node("a", 8 * GB, "box"), node("b", 8 * GB, "box")]
    assert layout(place(card((2 * MB,) * 30), nodes, Options(node_count_min=2))) == [("a", 17), ("b", 13)]


def test_layers_go_in_proportion_to_free_memory_and_the_vocabulary_counts_as_four() -> None:
    nodes = [node("a", 3 * GB), node("b", 9 * GB)]
    assert layout(place(card((2 * MB,) * 24), nodes, Options(node_count_min=2))) == [("b", 21), ("a", 3)]


def test_the_node_that_asked_is_the_head_if_it_takes_part() -> None:
    nodes = [node("a", 3 * GB), node("b", 9 * GB), node("c", 2 * GB)]
    asked = Options(node_count_min=2, asked_at=NodeId("id-a"))
    assert [name for name, _ in layout(place(card((2 * MB,) * 24), nodes, asked))] == ["a", "b"]
    elsewhere = Options(node_count_min=2, asked_at=NodeId("id-c"))
    assert [name for name, _ in layout(place(card((2 * MB,) * 24), nodes, elsewhere))] == ["b", "a"]


def test_equal_nodes_give_way_to_the_one_that_asked() -> None:
    nodes = [node("a", 8 * GB), node("b", 8 * GB)]
    assert layout(place(card((2 * MB,) * 30), nodes, Options(asked_at=NodeId("id-b")))) == [("b", 30)]


def test_the_context_shrinks_until_it_fits_but_not_below_the_least() -> None:
    model = card((2 * MB,) * 30)
    full = place(model, [node("a", 16 * GB)], Options())
    assert isinstance(full, Placement)
    assert (full.context_length, full.slot_count) == (8192, 4)
    tight = place(model, [node("a", 1 * GB)], Options())
    assert isinstance(tight, Placement)
    assert tight.context_length == 2048
    assert isinstance(place(model, [node("a", 400 * MB)], Options()), Refused)


def test_a_short_model_keeps_its_trained_context() -> None:
    placed = place(card((2 * MB,) * 4, trained=512), [node("a", 8 * GB)], Options())
    assert isinstance(placed, Placement)
    assert placed.context_length == 512


def test_promised_memory_is_not_given_twice() -> None:
    free = node("a", 2 * GB)
    promised = node("a", 2 * GB, promised=1700 * MB)
    assert isinstance(place(card((2 * MB,) * 30), [free], Options()), Placement)
    assert isinstance(place(card((2 * MB,) * 30), [promised], Options()), Refused)


def test_what_another_node_of_a_machine_was_promised_counts_for_those_that_were_chosen() -> None:
    nodes = [node("a", 8 * GB, "box"), node("b", 8 * GB, "box", promised=7 * GB)]
    model = card((100 * MB,) * 30)
    chosen = Options(node_ids=(NodeId("id-a"),), context_length=256, slot_count=1)
    assert isinstance(place(model, nodes[:1], chosen), Placement)
    assert "200 MB of 16.0 GB" in reason(place(model, nodes, chosen))


def test_what_one_node_loaded_after_another_of_its_machine_looked_at_the_memory_is_not_free() -> None:
    """Each of the two has seen its own runner load, and not yet the other one's."""
    nodes = [node("a", 8 * GB, "box", held=7 * GB), node("b", 8 * GB, "box", held=7 * GB)]
    model = card((100 * MB,) * 30)
    assert isinstance(place(model, nodes, Options(context_length=256, slot_count=1)), Refused)
    alone = Options(node_ids=(NodeId("id-a"),), context_length=256, slot_count=1)
    assert isinstance(place(model, nodes, alone), Refused)


def test_a_refusal_says_how_much_is_missing_and_where() -> None:
    nodes = [node("kitchen-pi", 1_100 * MB), node("desk", 6 * GB)]
    options = Options(context_length=1024, slot_count=1)
    assert reason(place(card((375 * MB,) * 32), nodes, options)) == (
        "model needs 12.2 GB on 1 node with a context of 1024 tokens in 1 slot; the cluster has 6.3 GB to give, so "
        "5.8 GB are missing: desk 5.4 GB of 12.0 GB; kitchen-pi 990 MB of 2.2 GB. "
        "Free memory, add a node, or choose a smaller model."
    )


@pytest.mark.parametrize(
    ("context", "slots", "hint"),
    [
        (1024, 1000, "With 62 slots it would fit; else free memory, add a node, or choose a smaller model."),
        (8192, 64, "With 8 slots it would fit; else free memory, add a node, or choose a smaller model."),
        (131072, 1, "With a context of 65536 tokens, or with a KV cache in 16-bit floats (`--kv-cache f16`), it "),
        (131072, 4, "With a context of 16384 tokens it would fit; else free memory, add a node, or choose a "),
    ],
)
def test_a_refusal_says_first_what_would_fit(context: int, slots: int, hint: str) -> None:
    model = replace(card((10 * MB,) * 32), context_length_max=131_072)
    refused = reason(place(model, [node("desk", 6 * GB)], Options(context_length=context, slot_count=slots)))
    assert hint in refused


def test_too_few_nodes_and_too_many() -> None:
    two = [node("a", 8 * GB), node("b", 8 * GB)]
    model = card((2 * MB,) * 4)
    assert reason(place(model, two, Options(node_count_min=3))).startswith("asked for 3 nodes, only 2 are here")
    assert "has only 4 layers" in reason(place(model, two, Options(node_count_min=5)))


def test_only_the_named_nodes_are_used() -> None:
    nodes = [node("a", 8 * GB), node("b", 16 * GB)]
    model = card((2 * MB,) * 4)
    assert layout(place(model, nodes, Options(node_ids=(NodeId("id-a"),)))) == [("a", 4)]
    assert "id-z" in reason(place(model, nodes, Options(node_ids=(NodeId("id-z"),))))


def test_odd_sizes_are_refused() -> None:
    nodes = [node("a", 8 * GB)]
    for options in (Options(context_length=0), Options(context_length=9000), Options(slot_count=0)):
        placed = place(card((2 * MB,) * 4), nodes, options)
        assert isinstance(placed, Refused)
        assert placed.status == 400
    one = reason(place(card((MB,) * 4), [node("a", 8 * GB)], Options(context_length=1)))
    assert f"takes 2 to {card((MB,) * 4).context_length_max} tokens" in one


@pytest.mark.parametrize("changes", [{"layer_count": 5}, {"layer_count": 0}, {"layer_bytes": (1,)}])
def test_a_card_that_contradicts_itself_is_refused(changes: dict[str, Any]) -> None:
    """It may come from another member, and must not end the node that leads."""
    odd = replace(card((MB,) * 4), **changes)
    expected = f"the card of model names {odd.layer_count} layers and the sizes of {len(odd.layer_bytes)}"
    assert reason(place(odd, [node("a", 8 * GB)], Options())).startswith(expected)


def test_exact_mode_fits_where_its_kernels_need_less() -> None:
    spared = SparedBytes((20 * MB,) * 4, 10 * MB)
    model = replace(card((100 * MB,) * 4), spared=spared)
    load = Load(model, 512, 4)
    less = shard_bytes(load, Shard(0, 4, 4)) - shard_bytes(replace(load, exact=True), Shard(0, 4, 4))
    assert less == 4 * 20 * MB + 10 * MB
    tight = [node("a", (shard_bytes(load, Shard(0, 4, 4)) - MB) * 10 // 9)]
    asked = Options(context_length=512, slot_count=4)
    assert isinstance(place(model, tight, asked), Refused)
    assert not isinstance(place(model, tight, replace(asked, exact=True)), Refused)


def test_a_card_whose_spared_bytes_are_those_of_other_layers_is_refused() -> None:
    odd = replace(card((MB,) * 4), spared=SparedBytes((1,), 1))
    assert "names 4 layers and the sizes of 1" in reason(place(odd, [node("a", 8 * GB)], Options(exact=True)))


def quantizable(layer: int, quantized_layer: int) -> ModelCard:
    small = QuantizedBytes(Quantizing.Q4, (quantized_layer,) * 4, 10 * MB, 20 * MB)
    return replace(card((layer,) * 4), quantized=(small,))


def test_quantised_weights_are_counted_as_they_will_be_held() -> None:
    model, nodes, quantized = quantizable(GB, 250 * MB), [node("a", 3 * GB)], Options(quantize=Quantizing.Q4)
    assert "needs 4" in reason(place(model, nodes, Options()))
    placed, smaller = place(model, nodes, quantized), place(card((250 * MB,) * 4, 10 * MB, 20 * MB), nodes, Options())
    assert isinstance(placed, Placement)
    assert placed == smaller


def test_what_could_not_be_quantised_is_told() -> None:
    refused = place(card((MB,) * 4), [node("a", 8 * GB)], Options(quantize=Quantizing.Q8))
    assert reason(refused) == "model has no matrices in full precision that could be rounded to q8: place it without."
    assert isinstance(refused, Refused)
    assert refused.status == 400
    odd = replace(quantizable(GB, MB), quantized=(QuantizedBytes(Quantizing.Q4, (MB,), MB, MB),))
    said = reason(place(odd, [node("a", 8 * GB)], Options(quantize=Quantizing.Q4)))
    assert said.startswith("the card of model names 4 layers and the sizes of 1")


def test_nobody_has_told_its_memory_yet() -> None:
    placed = place(card((2 * MB,) * 4), [], Options())
    assert isinstance(placed, Refused)
    assert placed.status == 503


def test_a_large_output_head_goes_where_it_fits() -> None:
    """The output head alone fills the larger node, so that one must be last although it would be first."""
    nodes = [node("a", 3 * GB), node("b", 1_200 * MB)]
    options = Options(node_count_min=2, context_length=64, slot_count=1)
    placed = place(card((100 * MB,) * 4, embedding=0, output=1_900 * MB), nodes, options)
    assert [name for name, _ in layout(placed)] == ["b", "a"]
