"""Writes folders as Hugging Face's libraries write them, tensor by tensor, without these libraries."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

NAMES = {"float32": "F32", "float16": "F16", "uint32": "U32", "int32": "I32", "uint8": "U8", "int64": "I64"}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def bfloat16(values: np.ndarray) -> "Brain":
    return Brain(values)


class Brain:
    """An array whose numbers are cut to bfloat16."""

    def __init__(self, values: np.ndarray) -> None:
        self.bits = (values.astype("<f4").view("<u4") >> 16).astype("<u2")

    @property
    def values(self) -> np.ndarray:
        return (self.bits.astype("<u4") << 16).view("<f4")


def safetensors(tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> bytes:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    content = b""
    for name, tensor in tensors.items():
        array = tensor.bits if isinstance(tensor, Brain) else np.ascontiguousarray(tensor)
        kind = "BF16" if isinstance(tensor, Brain) else NAMES[array.dtype.name]
        places = [len(content), len(content) + array.nbytes]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": places}
        content += array.tobytes()
    return with_header(json.dumps(header).encode(), content)


def with_header(header: bytes, content: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + content


def write_folder(path: Path, config: dict[str, Any], *shards: dict[str, Any]) -> Path:
    """One shard is `model.safetensors`, several have an index."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if len(shards) == 1:
        (path / "model.safetensors").write_bytes(safetensors(shards[0], {"format": "pt"}))
        return path
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        (path / name).write_bytes(safetensors(tensors))
        weight_map |= dict.fromkeys(tensors, name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def llama_tensors(config: dict[str, Any] = LLAMA, seed: int = 1) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.self_attn.q_proj.weight": (query, hidden),
            f"{at}.self_attn.k_proj.weight": (key, hidden),
            f"{at}.self_attn.v_proj.weight": (key, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, query),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.mlp.gate_proj.weight": (wide, hidden),
            f"{at}.mlp.up_proj.weight": (wide, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, wide),
        }
    shapes["model.norm.weight"] = (hidden,)
    return {
        name: (np.float32(len(shape) == 1) + 0.1 * generator.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_tokenizer(path: Path) -> None:
    """Of single bytes."""
    tokenizer = Tokenizer(BPE({text: i for i, text in enumerate(sorted(ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.save(str(path / "tokenizer.json"))
