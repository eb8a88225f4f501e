"""Writes a Llama of the shape of a 1 B model with random weights, in the tables' quantisations, for both programs.

    python bench/one_billion.py FILE.gguf FOLDER --llama-quantize PATH [--only Q4_1 Q4_0 Q4_K_M]

Tokens and all that is not a size come from FILE, a small Llama: hidden 2048, 16 layers, 32 query and 8 key-value heads
of 64, inner 8192, and the vocabulary of FILE, whose matrix is the output's, too. It takes 5 GB of memory and of disk
meanwhile.
"""

import argparse
import subprocess
from pathlib import Path
from typing import Final

import gguf
import numpy as np
from quantisations import QUANTIZE_SECONDS_MAX, Llama

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD, INNER = 2048, 16, 32, 8, 64, 8192
KINDS: Final = ("Q4_1", "Q4_0", "Q4_K_M")
SIZES: Final = {
    "embedding_length": HIDDEN,
    "block_count": LAYERS,
    "feed_forward_length": INNER,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "rope.dimension_count": HEAD,
}


def grow(model: Llama) -> None:
    """Random weights of about the size that training gives."""
    random = np.random.default_rng(1)
    vocabulary_size = len(model.tensors["token_embd.weight"])
    for key, size in SIZES.items():
        model.state(key, size, gguf.GGUFValueType.UINT32)
    model.tensors = {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else random.standard_normal(shape, np.float32) * np.float32(shape[1] ** -0.5)
        for name, shape in shapes(vocabulary_size, LAYERS).items()
    }


def shapes(vocabulary_size: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Of all tensors; the output matrix is the embedding."""
    inside: dict[str, tuple[int, ...]] = {
        "attn_norm": (HIDDEN,),
        "attn_q": (HEADS * HEAD, HIDDEN),
        "attn_k": (KV_HEADS * HEAD, HIDDEN),
        "attn_v": (KV_HEADS * HEAD, HIDDEN),
        "attn_output": (HIDDEN, HEADS * HEAD),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (INNER, HIDDEN),
        "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocabulary_size, HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    return found | {f"blk.{layer}.{name}.weight": shape for layer in range(layers) for name, shape in inside.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llama-quantize", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    model = Llama(options.model)
    grow(model)
    whole = options.folder / "F16.gguf"
    model.write(whole, "F16")
    for kind in options.only:
        command = [options.llama_quantize, whole, options.folder / f"{kind}.gguf", kind, "2"]
        subprocess.run(command, check=True, capture_output=True, timeout=QUANTIZE_SECONDS_MAX)
    whole.unlink()


if __name__ == "__main__":
    main()
