"""A tensor of small codes in blocks: as a file means it, and in the layout that matrix kernels take."""

from typing import Any, Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

HALF_BYTE: Final = 4  # bits
FLOAT_BYTES: Final = 4
KERNEL_BYTES: Final = 12  # beside a block's codes: a scale, twice, and what its sum of activations is multiplied by
HALVES_BYTES: Final = 5  # that exact mode adds to a block of 8 bits: a scale and half a byte of zeros for a second half

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


class Blocks(Struct, frozen=True):
    """A tensor taken apart: `weight = scale * (code - zero) + minimum`."""

    codes: Bytes  # [rows, blocks, weights of a block], each below 2**code_bits
    code_bits: int
    zero: int
    scales: Floats  # [rows, blocks]
    minimums: Floats | None  # [rows, blocks]


class PackedBlocks(Struct, frozen=True):
    """The layout of ONNX Runtime's `MatMulNBits`: `weight = scale * (code - 2**(bits - 1)) + offset`.

    With 4 bits two neighbouring codes share a byte, the first in its low half. The operator knows no `offsets`.
    """

    bits: int  # 4 or 8
    block_size: int  # weights
    codes: Bytes  # [rows, blocks, block_size * bits / 8]
    scales: Floats  # [rows, blocks]
    offsets: Floats | None  # [rows, blocks]


class Form(Struct, frozen=True):
    """How a tensor of blocks is held; a scale and an offset have 4 bytes each.

    What kernels hold was measured on x86-64 with Linux (`bench/memory.py`). Where sessions pack for themselves
    (docs/decisions/0010-kernel-file.md) an offset takes 4 bytes more, or 8.
    """

    bits: int
    block_size: int
    has_offsets: bool

    def byte_count(self, weights: int, *, is_multiplied: bool = True) -> int:
        """A table of embeddings is only looked up in, and not held by a kernel."""
        beside = KERNEL_BYTES if is_multiplied else self._plain_bytes()
        return self._blocks(weights) * (self.block_size * self.bits // 8 + beside)

    def spared_bytes(self, weights: int) -> int:
        """What exact mode holds less of it; below 0: more."""
        beside = self._plain_bytes() + (0 if self.bits == HALF_BYTE else HALVES_BYTES)
        return self._blocks(weights) * (KERNEL_BYTES - beside)

    def _blocks(self, weights: int) -> int:
        return -(-weights // self.block_size)

    def _plain_bytes(self) -> int:
        return FLOAT_BYTES * (1 + self.has_offsets)


def values_of(blocks: Blocks) -> Floats:
    """The exact weights: [rows, blocks, weights of a block]."""
    centred: Any = blocks.codes.astype(np.float32) - np.float32(blocks.zero)
    weights: Floats = blocks.scales[..., np.newaxis] * centred
    if blocks.minimums is not None:
        weights += blocks.minimums[..., np.newaxis]
    return weights


def pack_blocks(blocks: Blocks) -> PackedBlocks:
    """The codes, unchanged but for where they begin to count, as `MatMulNBits` wants them."""
    bits = HALF_BYTE if blocks.code_bits <= HALF_BYTE else 8
    centre = blocks.zero if blocks.minimums is None else 1 << (blocks.code_bits - 1)
    codes: Any = blocks.codes + np.uint8((1 << (bits - 1)) - centre)
    # A minimum counts from code 0, an offset from the centre; rounding this sum to float32 is far below the scale.
    offsets: Any = None if blocks.minimums is None else blocks.minimums + blocks.scales * np.float32(centre)
    if bits == HALF_BYTE:
        codes = paired(codes)
    return PackedBlocks(bits, blocks.codes.shape[-1], codes, blocks.scales, offsets)


def paired(codes: Any) -> Bytes:
    """Codes of 4 bits, two neighbours to a byte, the first in its low half."""
    return codes[..., 0::2] | codes[..., 1::2] << HALF_BYTE
