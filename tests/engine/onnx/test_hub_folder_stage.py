"""A folder computes what the GGUF file of the same weights computes, though nobody permuted the rows of its heads."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tiny_llama import FEED_FORWARD, HEAD, HEADS, HIDDEN, KV_HEADS, LAYERS, VOCABULARY, shapes, write_settings

from covey.checkpoints.checkpoint import TensorReader
from covey.checkpoints.hub_families import ENDS, FAMILIES
from covey.checkpoints.opening import open_checkpoint
from covey.checkpoints.quantization import dequantize
from covey.engine.contract import ALONE, LoadProgress, Piece
from covey.engine.onnx.stage import OnnxStage
from covey.schema.model import Shard
from tests.checkpoints.hub_folders import bfloat16, write_folder
from tests.engine.harness import make_spec

TOKENS = np.random.default_rng(3).integers(0, VOCABULARY, 40).astype(np.int64)
CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FEED_FORWARD, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512, "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip
THEIR_NAMES = {ours: theirs for theirs, ours in (ENDS | FAMILIES["llama"].layer).items()}


def hub_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if not stem.startswith("blk."):
        return f"model.{THEIR_NAMES[stem]}"
    _, layer, module = stem.split(".")
    return f"model.layers.{layer}.{THEIR_NAMES[module]}"


def plain_module(generator: np.random.Generator, shape: tuple[int, ...]) -> dict[str, Any]:
    if len(shape) == 1:
        return {"weight": bfloat16(1 + 0.1 * generator.standard_normal(shape))}
    return {"weight": bfloat16(generator.standard_normal(shape) / np.sqrt(shape[-1]))}


def words(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return generator.integers(-(2**31), 2**31, shape, np.int64).astype(np.int32)


def mlx_module(bits: int, group: int, generator: np.random.Generator, shape: tuple[int, ...]) -> dict[str, Any]:
    rows, columns = shape
    step = 3 / np.sqrt(columns) / 2**bits
    scales = step * (1 + 0.2 * generator.standard_normal((rows, columns // group)))
    biases = -scales * 2**bits / 2 + 0.02
    codes = words(generator, (rows, columns * bits // 32)).view(np.uint32)
    return {"weight": codes, "scales": bfloat16(scales), "biases": bfloat16(biases)}


def awq_or_gptq_module(method: str, generator: np.random.Generator, shape: tuple[int, ...]) -> dict[str, Any]:
    rows, columns = shape
    groups = columns // 64
    codes = (columns, rows // 8) if method == "awq" else (columns // 8, rows)
    zeros = np.full((groups, rows // 8), 0x78787878, np.int32)
    scales = 0.2 / np.sqrt(columns) * (1 + 0.2 * generator.standard_normal((groups, rows)))
    return {"qweight": words(generator, codes), "qzeros": zeros, "scales": scales.astype(np.float16)}


def hub_folder(path: Path, way: str, **settings: Any) -> Path:
    generator = np.random.default_rng(4)
    tensors: dict[str, Any] = {}
    quantization: dict[str, Any] = {}
    for name, shape in shapes(tied=True).items():
        is_matrix = len(shape) > 1 and "embd" not in name
        if way.startswith("mlx") and len(shape) > 1:
            bits, group = map(int, way.removeprefix("mlx ").split("/"))
            quantization = {"quantization": {"bits": bits, "group_size": group}}
            module = mlx_module(bits, group, generator, shape)
        elif way in {"awq", "gptq"} and is_matrix:
            quantization = {"quantization_config": {"quant_method": way, "bits": 4, "group_size": 64}}
            module = awq_or_gptq_module(way, generator, shape)
        else:
            module = plain_module(generator, shape)
        tensors |= {f"{hub_name(name)}.{kind}": tensor for kind, tensor in module.items()}
    names = list(tensors)
    shards = [{name: tensors[name] for name in part} for part in (names[:12], names[12:])]
    return write_folder(path, CONFIG | quantization | settings, *shards)


def gguf_twin(path: Path, folder: Path) -> Path:
    """Its values in F32, with the rows of heads in the order that GGUF files of Llama have."""
    writer = gguf.GGUFWriter(path, "llama")
    write_settings(writer, {})
    with TensorReader(folder) as reader:
        for name, entry in open_checkpoint(folder).tensors.items():
            values = dequantize(entry, reader.read(entry))
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
            if heads is not None:
                values = values.reshape(heads, 2, HEAD // 2, -1).swapaxes(1, 2).reshape(values.shape)
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def loaded(path: Path, layers: range = range(LAYERS), told: list[LoadProgress] | None = None) -> OnnxStage:
    spec = make_spec(
        engine="onnx", engine_options={"exact": "1"}, model_path=str(path),
        shard=Shard(layers.start, layers.stop, LAYERS), context_length=64, slot_count=1, thread_count=2,
    )  # fmt: skip
    stage = OnnxStage()
    stage.load(spec, (told if told is not None else []).append, ALONE)
    return stage


def logits(path: Path) -> np.ndarray:
    return loaded(path).run([Piece(0, 0, len(TOKENS), wants_logits=True)], TOKENS).copy()


@pytest.mark.parametrize("way", ["bf16", "mlx 2/32", "mlx 3/64", "mlx 4/64", "mlx 6/32", "mlx 8/128", "awq", "gptq"])
def test_the_same_logits_as_the_gguf_file(way, tmp_path):
    folder = hub_folder(tmp_path / "model", way)
    expected = logits(gguf_twin(tmp_path / "twin.gguf", folder))
    assert np.abs(logits(folder) - expected).max() < 1e-4 * expected.std()


def test_the_scaling_of_llama_3(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 32}
    folder = hub_folder(tmp_path / "model", "bf16", rope_scaling=scaling)
    expected = logits(gguf_twin(tmp_path / "twin.gguf", folder))
    assert np.abs(logits(folder) - expected).max() < 1e-4 * expected.std()
    without = logits(hub_folder(tmp_path / "without", "bf16"))
    assert np.abs(without - expected).max() > 1e-2 * expected.std()


@pytest.mark.parametrize("way", ["bf16", "mlx 4/64"])
def test_a_stage_reads_its_own_tensors_alone(way, tmp_path):
    folder, told = hub_folder(tmp_path / "model", way), list[LoadProgress]()
    loaded(folder, range(1, 2), told)
    tensors = open_checkpoint(folder).tensors
    own = sum(entry.byte_count for name, entry in tensors.items() if name.startswith("blk.1."))
    assert told[-1].bytes_loaded == told[-1].bytes_total == own
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    noise = np.random.default_rng(1)
    for name, entry in tensors.items():
        for part in () if name.startswith("blk.1.") else (entry.parts or (entry,)):
            assert index[part.name if entry.parts else f"{hub_name(name)}.weight"] == part.file
            with (folder / part.file).open("r+b") as file:
                file.seek(part.offset)
                file.write(noise.bytes(part.byte_count))
    values = noise.standard_normal((40, HIDDEN), np.float32)
    piece = [Piece(0, 0, 40, wants_logits=False)]
    clean = loaded(hub_folder(tmp_path / "clean", way), range(1, 2)).run(piece, values).copy()
    assert np.array_equal(loaded(folder, range(1, 2)).run(piece, values), clean)
