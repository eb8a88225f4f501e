"""A person names any GGUF file: the card must say what is in it, or say what is wrong with it."""

import contextlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from headers import llama_header, tensor
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from covey.checkpoints import catalogue
from covey.checkpoints.card import card_from_header
from covey.checkpoints.checkpoint import Checkpoint, CheckpointError
from covey.checkpoints.gguf_file import read_header
from covey.schema.ids import ModelId
from covey.schema.model import FileSource, ModelCard, Quantizing, SparedBytes

SOURCE = FileSource("/models/some.gguf")


def card_of(header: Checkpoint) -> ModelCard:
    return card_from_header(header, ModelId("some"), SOURCE)


def refusal(header: Checkpoint) -> str:
    with pytest.raises(CheckpointError) as caught:
        card_of(header)
    return str(caught.value)


def test_a_card_says_what_the_header_says() -> None:
    card = card_of(llama_header())
    assert card == ModelCard(
        model_id=ModelId("some"),
        source=SOURCE,
        architecture="llama",
        quantization="Q4_1",
        layer_count=3,
        hidden_size=64,
        attention_head_count=4,
        kv_head_count=2,
        head_size=16,
        feed_forward_size=128,
        vocabulary_size=100,
        context_length_max=2048,
        file_bytes=4557,
        layer_bytes=(312, 312, 312),  # two blocks of 16 bytes of codes and 12 of the kernel, and 64 floats
        embedding_bytes=7456,  # 200 packed blocks of 36 bytes; rope factors may be needed anywhere
        output_bytes=9312,  # the embedding again, as it is tied, and 8 bytes more for each block
        spared=SparedBytes((8, 8, 8), 600),  # 4 bytes for each block with offsets, and 3 for each of 8 bits without
    )


def test_an_output_of_its_own_replaces_the_tied_embedding() -> None:
    assert card_of(llama_header(tied=False)).output_bytes == 568


def test_what_full_precision_takes_where_it_is_quantised() -> None:
    """Of a layer's query 64 bytes of codes become 2 blocks of 32 weights; the router and what is narrow stay."""
    header = llama_header(tied=False)
    plain = [
        tensor("blk.1.attn_q.weight", 8192, kind="F16", shape=(64, 64)),
        tensor("blk.1.ffn_gate_inp.weight", 2048, kind="F32", shape=(8, 64)),
        tensor("blk.1.attn_k.weight", 128, kind="F16", shape=(8, 8)),
        tensor("token_embd.weight", 12800, kind="F16", shape=(100, 64)),
    ]
    card = card_of(replace(header, tensors=header.tensors | {each.name: each for each in plain}))
    q4, q8 = card.quantized
    routers_and_narrow = 4 * (8 * 64 + 8 * 8)
    assert card.layer_bytes == (312, 256 + 4 * 64 * 64 + routers_and_narrow, 312)
    assert (q4.quantize, q8.quantize) == (Quantizing.Q4, Quantizing.Q8)
    assert q4.layer_bytes == (312, 256 + 128 * (16 + 4 + 8) + routers_and_narrow, 312)
    assert q8.layer_bytes == (312, 256 + 128 * (32 + 4 + 8) + routers_and_narrow, 312)
    assert (card.spared, q4.spared, q8.spared) == tuple(  # the layer in the middle has no blocks in the file
        SparedBytes((8, count, 8), 8) for count in (0, 128 * 8, 128 * 3)
    )
    assert card.embedding_bytes - q4.embedding_bytes == 12800 - 200 * (16 + 4)
    assert (q4.output_bytes, q8.output_bytes) == (card.output_bytes, card.output_bytes)


def test_a_tied_output_is_as_small_as_the_embedding() -> None:
    embedding = tensor("token_embd.weight", 12800, kind="F16", shape=(100, 64))
    header = llama_header()
    card = card_of(replace(header, tensors=header.tensors | {embedding.name: embedding}))
    [q4, _] = card.quantized
    assert (card.embedding_bytes - q4.embedding_bytes) == 12800 - 200 * (16 + 4)  # a table stays in float16
    assert (card.output_bytes - q4.output_bytes) == 25600 - 200 * (16 + 4 + 8)


def test_what_may_be_missing_has_a_default() -> None:
    assert card_of(llama_header(without="llama.attention.head_count_kv")).kv_head_count == 4
    assert card_of(llama_header(without="llama.vocab_size")).vocabulary_size == 100
    assert card_of(llama_header(llama__attention__key_length=32)).head_size == 32
    experts = llama_header(without="llama.feed_forward_length", llama__expert_feed_forward_length=96)
    assert card_of(experts).feed_forward_size == 96


def test_sizes_that_vary_by_layer_count_as_the_largest() -> None:
    card = card_of(llama_header(llama__attention__head_count_kv=[0, 2, 1], llama__feed_forward_length=[128, 256, 64]))
    assert (card.kv_head_count, card.feed_forward_size) == (2, 256)


@pytest.mark.parametrize(
    "key",
    [
        "general.architecture",
        "llama.block_count",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.context_length",
        "token_embd.weight",
    ],
)
def test_what_is_missing_is_named(key: str) -> None:
    assert repr(key) in refusal(llama_header(without=key))


@pytest.mark.parametrize("wrong", [0, -1, 1 << 60, "four", 1.5, True, None, [], [0], ["a"], {}])
def test_absurd_values_are_named(wrong: Any) -> None:
    message = refusal(llama_header(llama__attention__head_count=wrong))
    assert "'llama.attention.head_count'" in message
    assert len(message) < 200


def test_a_size_that_contradicts_the_tensors_is_named() -> None:
    assert "'llama.vocab_size' is 99" in refusal(llama_header(llama__vocab_size=99))
    assert "'llama.embedding_length' of 65" in refusal(llama_header(llama__embedding_length=65))
    assert "'blk.2.attn_q.weight'" in refusal(llama_header(llama__block_count=2))
    assert "layer 3 has no tensors" in refusal(llama_header(llama__block_count=4))


def test_one_part_of_many_is_refused() -> None:
    assert "one of 3 parts" in refusal(llama_header(split__count=3))


def test_a_model_of_unknown_architecture_has_a_card_too() -> None:
    header = llama_header(general__architecture="novel", without="llama.vocab_size")
    renamed = {key.replace("llama.", "novel."): value for key, value in header.metadata.items()}
    assert card_of(msgspec.structs.replace(header, metadata=renamed)).architecture == "novel"


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 1 << 65),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-3, 300)),
)
KEYS = st.sampled_from([*llama_header().metadata, "llama.attention.key_length", "split.count"])
NAMES = st.sampled_from(
    ["token_embd.weight", "blk.0.x", "blk.9999999.x", "blk.-1.x", "blk.7", "output.weight", "x", ""]
)


@given(st.dictionaries(KEYS, VALUES, max_size=3), st.lists(NAMES, max_size=3), st.lists(NAMES, max_size=2))
def test_no_header_makes_anything_but_a_card_or_a_checkpoint_error(
    metadata: dict[str, Any], added: list[str], removed: list[str]
) -> None:
    header = llama_header()
    tensors = header.tensors | {name: tensor(name, 10) for name in added}
    tensors = {name: each for name, each in tensors.items() if name not in removed}
    changed = msgspec.structs.replace(header, metadata=header.metadata | metadata, tensors=tensors)
    with contextlib.suppress(CheckpointError):
        card = card_of(changed)
        assert len(card.layer_bytes) == card.layer_count
        assert all(size > 0 for size in (*card.layer_bytes, card.head_size, card.vocabulary_size))


def test_the_stored_card_of_the_demo_model_is_that_of_its_file(demo_model: Path) -> None:
    stored = catalogue.find("SmolLM2-135M-Instruct")
    assert stored is not None
    assert card_from_header(read_header(demo_model), stored.model_id, stored.source) == stored
