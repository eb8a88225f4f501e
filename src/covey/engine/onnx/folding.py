"""Carries the offsets of 4-bit blocks inside the matrix of codes, where the float product with them costs too much.

A weight is `scale * (code - 8) + offset`. The operator takes whole zero points, so of the offset it takes the nearest
multiple of the scale for nothing; what is left is at most half a scale. That times the sum of a block's activations is
a product like any other: with the sums behind the activations, what is left becomes further blocks of each row, as two
codes of 4 bits, of which the second holds what the first rounded away. Their error is about 1/450 of a scale.
"""

from typing import Any, Final

import numpy as np
from msgspec import Struct

from covey.checkpoints.blocks import HALF_BYTE, Bytes, Floats, paired
from covey.checkpoints.quantization import PackedBlocks

CENTRE: Final = 1 << (HALF_BYTE - 1)  # the code that is zero where nothing else is said
TOP: Final = (1 << HALF_BYTE) - 1
DIGITS: Final = 2
STEPS: Final = 7.5  # of a code from the centre to the end
LEFT_MAX: Final = 0.4  # of the scales, root of the mean squares; 0.29 where all offsets are within reach
ERROR_MAX: Final = 0.01  # of the scales, likewise; rounding weights to codes has cost 0.29 already


class Folded(Struct, frozen=True):
    """With the activations `[x, sums, sums]`, where the sums of the blocks are filled up with zeros to whole blocks."""

    codes: Bytes  # [rows, blocks and more, block_size / 2]
    scales: Floats  # [rows, blocks and more]
    zeros: Bytes  # [rows, half as many]


def filling(matrix: PackedBlocks) -> int:
    """How many zeros follow the block sums."""
    return -matrix.scales.shape[1] % matrix.block_size


def fold(matrix: PackedBlocks) -> Folded | None:
    """None where that would lose something: no offsets, codes of 8 bits, or offsets far from what codes reach."""
    if matrix.offsets is None or matrix.bits != HALF_BYTE:
        return None
    zeros, left = _nearest(matrix.scales, matrix.offsets)
    if _size(left) > LEFT_MAX * _size(matrix.scales):
        return None  # the sums are rounded, too, and that would show
    padded: Any = np.pad(left, ((0, 0), (0, filling(matrix)))).reshape(len(left), -1, matrix.block_size)
    codes, scales = [matrix.codes], [matrix.scales]
    for _ in range(DIGITS):
        digit, scale = _digit(padded)
        padded = padded - scale[..., np.newaxis] * (digit.astype(np.float32) - CENTRE)
        codes.append(paired(digit))
        scales.append(scale)
    if _size(padded.reshape(len(left), -1)[:, : left.shape[1]]) > ERROR_MAX * _size(matrix.scales):
        return None
    more = DIGITS * padded.shape[1]
    even = (zeros.shape[1] + more) % 2
    all_zeros = np.pad(zeros, ((0, 0), (0, more + even)), constant_values=CENTRE)
    return Folded(np.concatenate(codes, axis=1), np.concatenate(scales, axis=1), paired(all_zeros))


def _nearest(scales: Floats, offsets: Floats) -> tuple[Bytes, Floats]:
    """Zero points, and what they leave of the offsets."""
    steps: Any = np.divide(offsets, scales, out=np.zeros_like(offsets), where=scales != 0)
    zeros: Any = np.clip(np.rint(CENTRE - steps), 0, TOP)
    return zeros.astype(np.uint8), (offsets - scales * (CENTRE - zeros)).astype(np.float32)


def _digit(values: Floats) -> tuple[Bytes, Floats]:
    """Codes, and a scale for each block."""
    scales: Any = np.abs(values).max(-1) / np.float32(STEPS)
    inverse: Any = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    codes: Any = np.clip(np.rint(values * inverse[..., np.newaxis]) + CENTRE, 0, TOP)
    return codes.astype(np.uint8), scales


def _size(values: Floats) -> float:
    return float(np.sqrt(np.square(values, dtype=np.float64).mean()))
