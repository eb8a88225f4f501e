"""Makes full-precision weights small: rounds them to codes of 4 or 8 bits in blocks, and says what that costs.

The way is that of GGUF's Q4_0 and Q8_0 (ggml's `quantize_row_q4_0_ref`, `quantize_row_q8_0_ref`), but that scales stay
float32: nothing has to be written to a file.
"""

import math
from typing import Any, Final

import numpy as np

from covey.checkpoints.blocks import Blocks, Floats, PackedBlocks, pack_blocks, values_of

BLOCK_SIZE: Final = 32
BITS: Final = {"q4": 4, "q8": 8}


def quantize(weights: Floats, bits: int) -> PackedBlocks:
    """`weights`: [..., rows, columns], columns a multiple of 32; `bits`: 4 or 8."""
    return pack_blocks(rounded(weights, bits))


def rounded(weights: Floats, bits: int) -> Blocks:
    groups = weights.reshape(math.prod(weights.shape[:-1]), -1, BLOCK_SIZE)
    places = np.abs(groups).argmax(-1, keepdims=True)
    largest: Any = np.take_along_axis(groups, places, -1)
    # With 4 bits the largest weight becomes code 0, for there is one code more below the middle than above it.
    scales: Any = largest / np.float32(-8) if bits == 4 else np.abs(largest) / np.float32(127)  # noqa: PLR2004
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    zero, top = 1 << (bits - 1), (1 << bits) - 1
    codes: Any = np.clip(np.rint(groups * inverse) + zero, 0, top)
    return Blocks(codes.astype(np.uint8), bits, zero, scales[..., 0].astype(np.float32), None)


def error_of(weights: Floats, bits: int) -> float:
    """The root of the mean square of what rounding changes, by that of the weights: 0 is exact, 1 is all lost."""
    changed = values_of(rounded(weights, bits)).reshape(weights.shape).astype(np.float64) - weights
    power = float(np.mean(np.square(weights, dtype=np.float64)))
    return math.sqrt(float(np.mean(np.square(changed))) / power) if power else 0.0
