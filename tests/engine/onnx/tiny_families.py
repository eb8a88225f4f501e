"""Tiny random checkpoints of every family that the engine knows, as GGUF files.

Weights follow from the names of the tensors, so that none have to be kept: `make_family_goldens.py` gives the same ones
to an independent implementation, whose logits are kept in `goldens`.
"""

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

HIDDEN, HEADS, KV_HEADS, FEED_FORWARD, VOCABULARY = 64, 4, 2, 96, 96
EXPERT_FEED_FORWARD = 32
CONTEXT = 64
WINDOW = 8  # tokens, far fewer than are asked
TOKENS = 40
PERMUTED = ("llama", "smollm3", "granite")  # architectures whose queries and keys GGUF permutes


class Tiny(NamedTuple):
    architecture: str
    layers: int
    head_size: int
    metadata: dict[str, Any]  # without the architecture's name before the keys
    shapes: dict[str, tuple[int, ...]]  # of tensors by name; those of a layer without its number
    tied: bool = True
    factors: dict[str, tuple[float, ...]] = {}  # noqa: RUF012  # whole tensors that are no random numbers

    @property
    def heads(self) -> tuple[int, int]:
        return self.metadata["attention.head_count"], self.metadata["attention.head_count_kv"]


def tensors(tiny: Tiny) -> dict[str, np.ndarray]:
    """All of the file's, by the names of GGUF."""
    names = {f"blk.{layer}.{name}": shape for layer in range(tiny.layers) for name, shape in tiny.shapes.items()}
    names |= {"token_embd.weight": (VOCABULARY, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tiny.tied:
        names["output.weight"] = (VOCABULARY, HIDDEN)
    found = {name: values(name, shape) for name, shape in names.items()}
    return found | {name: np.array(factors, np.float32) for name, factors in tiny.factors.items()}


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Raw bits of a generator whose stream is promised to stay; distributions are not."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    uniform = ((raw >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - 1).reshape(shape)
    if name.endswith("norm.weight"):
        return 1 + np.float32(0.3) * uniform
    if name.endswith("_exps.bias"):
        return 9 * uniform  # beyond where gpt-oss clips
    if len(shape) == 1 or name.endswith(".bias"):
        return uniform
    return uniform * np.float32(2.5 / np.sqrt(shape[-1]))


def token_ids() -> np.ndarray:
    raw = np.random.PCG64(7).random_raw(TOKENS)
    return (raw % np.uint64(VOCABULARY)).astype(np.int64)


def write(
    tiny: Tiny,
    path: Path,
    *,
    stated: dict[str, Any] | None = None,
    without: tuple[str, ...] = (),
    experts: str = "F32",
    dequantised: bool = False,
    like_hugging_face: bool = False,
) -> Path:
    """`stated`: more metadata, with whole keys; `without`: tensors that are left out; `experts`: their type."""
    writer = gguf.GGUFWriter(path, tiny.architecture)
    prefixed = {f"{tiny.architecture}.{key}": value for key, value in tiny.metadata.items()}
    for key, value in (prefixed | (stated or {})).items():
        add(writer, key, value)
    for name, plain in tensors(tiny).items():
        content, kind = plain, gguf.GGMLQuantizationType.F32
        if like_hugging_face:
            content = unpermuted(tiny, name, content) - name.endswith("norm.weight")
        if name.endswith("_exps.weight"):
            kind = gguf.GGMLQuantizationType[experts]
            content = gguf.quants.quantize(content, kind)
            if dequantised:
                content, kind = gguf.quants.dequantize(content, kind), gguf.GGMLQuantizationType.F32
        if name not in without:
            writer.add_tensor(name, content, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def unpermuted(tiny: Tiny, name: str, content: np.ndarray) -> np.ndarray:
    """Values of a head that are turned together are neighbours in GGUF files, and half a head apart elsewhere."""
    for inner, heads in zip(("attn_q.weight", "attn_k.weight"), tiny.heads, strict=True):
        if tiny.architecture in PERMUTED and name.endswith(inner):
            pairs = content.reshape(heads, tiny.head_size // 2, 2, HIDDEN)
            return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(content.shape)
    return content


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def tiny(
    architecture: str, *, layers: int = 3, heads: tuple[int, int] = (HEADS, KV_HEADS), head: int = 16, **changes: Any
) -> Tiny:
    """A plain Llama under another name; `add` and `drop` say what differs."""
    metadata = {
        "block_count": layers,
        "context_length": CONTEXT,
        "embedding_length": HIDDEN,
        "feed_forward_length": FEED_FORWARD,
        "attention.head_count": heads[0],
        "attention.head_count_kv": heads[1],
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.freq_base": 10000.0,
    }
    shapes = {
        "attn_norm.weight": (HIDDEN,),
        "attn_q.weight": (heads[0] * head, HIDDEN),
        "attn_k.weight": (heads[1] * head, HIDDEN),
        "attn_v.weight": (heads[1] * head, HIDDEN),
        "attn_output.weight": (HIDDEN, heads[0] * head),
        "ffn_norm.weight": (HIDDEN,),
        "ffn_gate.weight": (FEED_FORWARD, HIDDEN),
        "ffn_up.weight": (FEED_FORWARD, HIDDEN),
        "ffn_down.weight": (HIDDEN, FEED_FORWARD),
    } | changes.pop("more", {})
    for name in changes.pop("less", ()):
        del shapes[name]
    metadata |= changes.pop("states", {})
    return Tiny(architecture, layers, head, metadata, shapes, **changes)


HEAD_NORMS = {"attn_q_norm.weight": (32,), "attn_k_norm.weight": (32,)}
POST_NORMS = {"post_attention_norm.weight": (HIDDEN,), "post_ffw_norm.weight": (HIDDEN,)}
QKV_BIASES = {"attn_q.bias": (64,), "attn_k.bias": (32,), "attn_v.bias": (32,)}
SHORT_FACTORS = tuple(1 + 0.1 * index for index in range(8))
LONG_FACTORS = tuple(1 + 1.7 * index for index in range(8))
LLAMA3 = {
    "rope.scaling.type": "llama3",
    "rope.scaling.factor": 8.0,
    "rope.scaling.low_freq_factor": 1.0,
    "rope.scaling.high_freq_factor": 4.0,
    "rope.scaling.original_context_length": 32,
}

PHI3 = {
    "heads": (2, 1),
    "head": 32,
    "more": {"attn_qkv.weight": (128, HIDDEN), "ffn_up.weight": (2 * FEED_FORWARD, HIDDEN)},
    "less": ("attn_q.weight", "attn_k.weight", "attn_v.weight", "ffn_gate.weight"),
    "tied": False,
}
DENSE = ("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight")


def mixture(experts: int, used: int) -> dict[str, Any]:
    return {"expert_count": experts, "expert_used_count": used, "expert_feed_forward_length": EXPERT_FEED_FORWARD}


def expert_shapes(experts: int) -> dict[str, tuple[int, ...]]:
    return {
        "ffn_gate_inp.weight": (experts, HIDDEN),
        "ffn_gate_exps.weight": (experts, EXPERT_FEED_FORWARD, HIDDEN),
        "ffn_up_exps.weight": (experts, EXPERT_FEED_FORWARD, HIDDEN),
        "ffn_down_exps.weight": (experts, HIDDEN, EXPERT_FEED_FORWARD),
    }


def biases(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name.replace("weight", "bias"): shape[:-1] for name, shape in shapes.items()}


YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 16,
}

FAMILIES = {
    "llama": tiny("llama", tied=False),
    "llama3": tiny("llama", states=LLAMA3),
    "mistral": tiny("llama", states={"attention.sliding_window": WINDOW}, tied=False),
    "smollm3": tiny("smollm3", layers=5),
    "qwen2": tiny("qwen2", more=QKV_BIASES),
    "qwen3": tiny("qwen3", head=32, more=HEAD_NORMS),
    "qwen3-yarn": tiny("qwen3", head=32, more=HEAD_NORMS, states=YARN),
    "gemma2": tiny(
        "gemma2",
        layers=4,
        head=32,
        more=POST_NORMS,
        states={
            "attention.sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": tiny(
        "gemma3",
        layers=7,
        head=32,
        more=POST_NORMS | HEAD_NORMS,
        states={
            "attention.sliding_window": WINDOW,
            "rope.freq_base": 1000000.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "phi3": tiny("phi3", states={"rope.dimension_count": 16}, **PHI3),
    "phi3-long": tiny(
        "phi3",
        states={
            "rope.dimension_count": 16,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.attn_factor": 1.2,
        },
        factors={"rope_factors_short.weight": SHORT_FACTORS, "rope_factors_long.weight": LONG_FACTORS},
        **PHI3,
    ),
    "olmo2": tiny(
        "olmo2",
        more=POST_NORMS | {"attn_q_norm.weight": (64,), "attn_k_norm.weight": (32,)},
        less=("attn_norm.weight", "ffn_norm.weight"),
        tied=False,
    ),
    "olmo3": tiny(
        "olmo2",
        layers=5,
        more=POST_NORMS | {"attn_q_norm.weight": (64,), "attn_k_norm.weight": (32,)},
        less=("attn_norm.weight", "ffn_norm.weight"),
        states=YARN | {"attention.sliding_window": WINDOW},
        tied=False,
    ),
    "granite": tiny(
        "granite",
        states={
            "attention.scale": 0.4,
            "embedding_scale": 3.0,
            "residual_scale": 0.6,
            "logit_scale": 4.0,
        },
    ),
    "mixtral": tiny("llama", states=mixture(4, 2), more=expert_shapes(4), less=DENSE, tied=False),
    "qwen3moe": tiny(
        "qwen3moe", head=32, states=mixture(20, 3), more=HEAD_NORMS | expert_shapes(20), less=DENSE, tied=False
    ),
    "gpt-oss": tiny(
        "gpt-oss",
        head=32,
        states=mixture(12, 4) | YARN | {"attention.sliding_window": WINDOW},
        more=expert_shapes(12)
        | biases(expert_shapes(12))
        | {"attn_q.bias": (128,), "attn_k.bias": (64,), "attn_v.bias": (64,)}
        | {"attn_output.bias": (HIDDEN,), "attn_sinks.weight": (HEADS,), "post_attention_norm.weight": (HIDDEN,)},
        less=(*DENSE, "ffn_norm.weight"),
        tied=False,
    ),
}
