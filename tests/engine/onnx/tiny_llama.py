"""Writes tiny Llama checkpoints with random weights, of any tensor type, with the `gguf` package."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

HIDDEN, HEADS, KV_HEADS, HEAD, FEED_FORWARD, LAYERS, VOCABULARY = 256, 4, 2, 64, 512, 3, 320
# Where a block's float16 numbers lie, and one for each that gives weights of a usual size. The reference package can't
# quantise to these types, but any bytes are valid.
SCALES = {
    "Q2_K": {80: 7e-3, 82: 1e-2},
    "Q3_K": {108: 1.5e-3},
    "Q4_K": {0: 4e-4, 2: 3e-3},
    "Q5_K": {0: 2e-4, 2: 3e-3},
    "Q6_K": {208: 3e-5},
    "IQ4_NL": {0: 1e-3},
    "IQ4_XS": {0: 5e-5},
}


def write_tiny_llama(
    path: Path, types: dict[str, str], *, default: str, tied: bool = True, extra: dict[str, Any] | None = None
) -> Path:
    """`types`: by the end of a tensor's name, for example {"attn_v": "Q6_K"}; norms are always F32."""
    writer = gguf.GGUFWriter(path, (extra or {}).get("architecture", "llama"))
    write_settings(writer, extra or {})
    generator = np.random.default_rng(11)
    for name, shape in shapes(tied=tied).items():
        tensor_type = next((kind for end, kind in types.items() if name.endswith(f"{end}.weight")), default)
        if "norm" in name:
            writer.add_tensor(name, 1 + 0.1 * generator.standard_normal(shape).astype(np.float32))
        else:
            content = random_tensor(generator, tensor_type, shape)
            writer.add_tensor(name, content, raw_dtype=gguf.GGMLQuantizationType[tensor_type])
    for name, values in (extra or {}).get("tensors", {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_settings(writer: gguf.GGUFWriter, extra: dict[str, Any]) -> None:
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_context_length(512)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD)
    for key, value in extra.get("floats", {}).items():
        writer.add_float32(key, value)
    for key, value in extra.get("integers", {}).items():
        writer.add_uint32(key, value)
    for key, value in extra.get("texts", {}).items():
        writer.add_string(key, value)


def shapes(*, tied: bool) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        found |= {
            f"blk.{layer}.attn_norm.weight": (HIDDEN,),
            f"blk.{layer}.attn_q.weight": (HEADS * HEAD, HIDDEN),
            f"blk.{layer}.attn_k.weight": (KV_HEADS * HEAD, HIDDEN),
            f"blk.{layer}.attn_v.weight": (KV_HEADS * HEAD, HIDDEN),
            f"blk.{layer}.attn_output.weight": (HIDDEN, HEADS * HEAD),
            f"blk.{layer}.ffn_norm.weight": (HIDDEN,),
            f"blk.{layer}.ffn_gate.weight": (FEED_FORWARD, HIDDEN),
            f"blk.{layer}.ffn_up.weight": (FEED_FORWARD, HIDDEN),
            f"blk.{layer}.ffn_down.weight": (HIDDEN, FEED_FORWARD),
        }
    found["output_norm.weight"] = (HIDDEN,)
    if not tied:
        found["output.weight"] = (VOCABULARY, HIDDEN)
    return found


def random_tensor(generator: np.random.Generator, tensor_type: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights of about the size that training gives: 1 / sqrt(columns)."""
    if tensor_type in SCALES:
        return random_blocks(generator, tensor_type, shape)
    weights = generator.standard_normal(shape).astype(np.float32) / np.sqrt(shape[-1])
    if tensor_type == "Q4_1":
        weights += np.float32(0.02)  # a minimum that matters
    return gguf.quants.quantize(weights, gguf.GGMLQuantizationType[tensor_type])


def random_blocks(generator: np.random.Generator, tensor_type: str, shape: tuple[int, ...]) -> np.ndarray:
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor_type]]
    rows = int(np.prod(shape[:-1]))
    content = generator.integers(0, 256, (rows, shape[-1] // elements, size), np.uint8)
    for place, step in SCALES[tensor_type].items():
        content[..., place : place + 2] = np.array([step], np.float16).view(np.uint8)
    return content.reshape(rows, -1)
