"""Writes mlx.npz: matrices that MLX quantised, and what MLX says that they are. Needs `mlx[cpu]` 0.32 and NumPy alone.

python tests/checkpoints/golden/make_mlx.py
"""

from pathlib import Path

import mlx.core as mx
import numpy as np

ROWS, COLUMNS = 3, 256


def write(path: Path) -> None:
    weights = mx.array(np.random.default_rng(5).standard_normal((ROWS, COLUMNS)).astype(np.float32))
    arrays: dict[str, np.ndarray] = {}
    for bits in (2, 3, 4, 5, 6, 8):
        for group in (32, 64, 128):
            words, scales, biases = mx.quantize(weights, group_size=group, bits=bits)
            values = mx.dequantize(words, scales, biases, group_size=group, bits=bits)
            for name, array in {"words": words, "scales": scales, "biases": biases, "values": values}.items():
                arrays[f"{bits}.{group}.{name}"] = np.array(array)
    words, exponents = mx.quantize(weights, group_size=32, bits=4, mode="mxfp4")
    values = mx.dequantize(words, exponents, group_size=32, bits=4, mode="mxfp4")
    named = {"words": words, "scales": exponents, "values": values.astype(mx.float32)}
    arrays |= {f"mxfp4.{name}": np.array(array) for name, array in named.items()}
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    write(Path(__file__).with_name("mlx.npz"))
