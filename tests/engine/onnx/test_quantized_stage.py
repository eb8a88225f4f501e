"""Matrices in full precision that are rounded when they are loaded: right numbers, in the memory that was said."""

import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tiny_families
import tiny_llama
from llama_twin import LlamaTwin, divergences
from test_hub_folder_stage import hub_folder
from tiny_families import FAMILIES
from tiny_llama import LAYERS, write_tiny_llama

from covey.checkpoints.blocks import KERNEL_BYTES, PackedBlocks, values_of
from covey.checkpoints.card import card_from_header
from covey.checkpoints.checkpoint import TensorReader
from covey.checkpoints.opening import open_checkpoint
from covey.checkpoints.quantizing import BITS, can_be_quantized, rounded
from covey.engine.contract import ALONE, Piece
from covey.engine.onnx.settings import read_settings
from covey.engine.onnx.stage import OnnxStage
from covey.engine.onnx.weights import StageFile
from covey.schema.ids import ModelId
from covey.schema.model import FileSource, ModelCard, Quantizing, Shard
from tests.engine.harness import make_spec

TOKENS = np.random.default_rng(3).integers(0, tiny_families.VOCABULARY, 40).astype(np.int64)


def logits(path: Path, layers: int, *cuts: int, **engine_options: str) -> np.ndarray:
    """After every token, from one stage for each pair of neighbouring bounds."""
    values = TOKENS
    for start, end in pairwise((0, *cuts, layers)):
        stage = OnnxStage()
        spec = make_spec(
            engine="onnx", engine_options=engine_options, model_path=str(path), shard=Shard(start, end, layers),
            context_length=64, slot_count=1, thread_count=2,
        )  # fmt: skip
        stage.load(spec, lambda _: None, ALONE)
        whole = Piece(0, 0, len(TOKENS), wants_logits=True, guess_count=len(TOKENS) - 1)
        values = stage.run([whole], values).copy()
    return values


def rounded_weights(path: Path, weights: dict[str, np.ndarray], quantize: Quantizing) -> dict[str, np.ndarray]:
    """`weights` of the file as they are after rounding, where it can be done."""
    entries = open_checkpoint(path).tensors
    return {
        name: values_of(rounded(values, BITS[quantize])).reshape(values.shape)
        if can_be_quantized(entries[name])
        else values
        for name, values in weights.items()
    }


@pytest.mark.parametrize("output", ["tied", "of its own"])
@pytest.mark.parametrize("quantize", Quantizing)
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_the_numbers_are_those_of_rounded_weights(kind: str, quantize: Quantizing, output: str, tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", {}, default=kind, tied=output == "tied")
    twin = LlamaTwin(path)
    twin.weights = rounded_weights(path, twin.weights, quantize)
    expected = twin.logits(TOKENS.tolist())
    for cuts in ((), (1,)):
        exact = logits(path, LAYERS, *cuts, quantize=quantize, exact="1")
        assert np.abs(exact - expected).max() < 1e-4 * expected.std()
    fast = logits(path, LAYERS, quantize=quantize)
    assert np.sqrt(np.mean((fast - expected) ** 2)) < 0.03 * expected.std()


def test_8_bits_say_what_full_precision_says(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", {}, default="F16")
    full, quantized = logits(path, LAYERS), logits(path, LAYERS, quantize="q8")
    assert divergences(full, quantized).mean() < 1e-3
    ranked = np.sort(full, axis=-1)
    is_clear = ranked[:, -1] - ranked[:, -2] > 0.1 * full.std()
    assert is_clear.mean() > 0.5
    assert (full.argmax(-1) == quantized.argmax(-1))[is_clear].all()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_its_experts(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = FAMILIES[family]
    path = tiny_families.write(tiny, tmp_path / "full.gguf")
    small = rounded_weights(path, tiny_families.tensors(tiny), Quantizing.Q4)
    monkeypatch.setattr(tiny_families, "tensors", lambda _: small)
    expected = logits(tiny_families.write(tiny, tmp_path / "rounded.gguf"), tiny.layers)
    actual = logits(path, tiny.layers, quantize="q4", exact="1")
    assert np.abs(actual - expected).max() < 1e-4 * np.ptp(expected)


def test_a_folder(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "model", "bf16")
    full, small = logits(folder, LAYERS), logits(folder, LAYERS, quantize="q8", exact="1")
    difference = np.sqrt(np.mean((full - small) ** 2))
    assert 0 < difference < 0.03 * full.std()


def test_what_is_quantised_already_stays_as_it_is(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", {"token_embd": "Q8_0"}, default="Q4_1")
    assert np.array_equal(logits(path, LAYERS), logits(path, LAYERS, quantize="q4"))
    assert card_of(path).quantized == ()


# ---- memory ----


def card_of(path: Path) -> ModelCard:
    return card_from_header(open_checkpoint(path), ModelId("it"), FileSource(str(path)))


def byte_count(held: Any, *, is_multiplied: bool = True) -> int:
    """Of all arrays in it; blocks as a kernel holds them."""
    if isinstance(held, np.ndarray):
        return held.nbytes
    if isinstance(held, tuple | list):
        return sum(map(byte_count, held))
    if not isinstance(held, msgspec.Struct):
        return 0
    if isinstance(held, PackedBlocks) and is_multiplied:
        return held.codes.nbytes + KERNEL_BYTES * held.scales.size
    return sum(map(byte_count, msgspec.structs.astuple(held)))


def read(path: Path, shard: Shard, quantize: Quantizing | None) -> tuple[list[Any], list[Any]]:
    """Its layers, and its table and head."""
    header = open_checkpoint(path)
    with TensorReader(path) as reader:
        bits = None if quantize is None else BITS[quantize]
        file = StageFile(reader, header, read_settings(header), shard, 64, bits)
        ends = list(file.read_ends())
        return [file.read_layer(layer) for layer in range(shard.layer_start, shard.layer_end)], ends


def write(kind: str, folder: Path) -> Path:
    if kind == "folder":
        return hub_folder(folder / "model", "bf16")
    if kind in FAMILIES:
        return tiny_families.write(FAMILIES[kind], folder / "experts.gguf")
    return write_tiny_llama(folder / "tiny.gguf", {"attn_v": "Q4_1"}, default=kind, tied=False)


@pytest.mark.parametrize("quantize", [None, *Quantizing])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "folder", "qwen3moe", "gpt-oss"])
def test_what_is_held_is_what_the_card_says(kind: str, quantize: Quantizing | None, tmp_path: Path) -> None:
    path = write(kind, tmp_path)
    card = card_of(path)
    count, said = card.layer_count, next((each for each in card.quantized if each.quantize is quantize), card)
    layers, [table, _] = read(path, Shard(0, 1, count), quantize)
    assert (byte_count(layers), byte_count(table, is_multiplied=False)) == (said.layer_bytes[0], said.embedding_bytes)
    layers, [_, head] = read(path, Shard(count - 1, count, count), quantize)
    assert (byte_count(layers), byte_count(head)) == (said.layer_bytes[-1], said.output_bytes)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("quantize", Quantizing)
def test_no_more_than_one_tensor_is_ever_large(
    kind: str, quantize: Quantizing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_llama, "VOCABULARY", 1 << 15)
    path = write_tiny_llama(tmp_path / "tiny.gguf", {}, default=kind)
    in_full = 4 * tiny_llama.VOCABULARY * tiny_llama.HIDDEN
    shard = Shard(0, LAYERS, LAYERS)
    read(path, shard, quantize)  # what is imported and cached then
    tracemalloc.start()
    try:
        layers, [table, _] = read(path, shard, quantize)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.3 * byte_count([*layers, table]) + in_full
