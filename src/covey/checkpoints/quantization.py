"""The block formats of GGUF tensors: their exact values, and the layout that matrix kernels take.

All of them store rows of blocks in which a weight is `scale * (code - zero) + minimum`, with a small unsigned code
for each weight, and for each block a scale and in some formats a minimum. The layouts are those of ggml's
`ggml-common.h` (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h); Q4_K, Q5_K and Q6_K pack several
blocks into a super-block of 256 weights whose scales are themselves small integers times a float16.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from covey.checkpoints.gguf_file import TENSOR_TYPES, CheckpointError, TensorEntry

HALF_BYTE: Final = 4  # bits
FLOAT_BYTES: Final = 4

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


def dequantize(entry: TensorEntry, content: Bytes) -> Floats:
    """The tensor's exact values, in its shape. Raises `CheckpointError` for a type that isn't known."""
    if entry.type in _PLAIN:
        return _PLAIN[entry.type](content).reshape(entry.shape)
    blocks = take_apart(entry, content)
    centred: Any = blocks.codes.astype(np.float32) - np.float32(blocks.zero)
    weights: Floats = blocks.scales[..., np.newaxis] * centred
    if blocks.minimums is not None:
        weights += blocks.minimums[..., np.newaxis]
    return weights.reshape(entry.shape)


def pack(entry: TensorEntry, content: Bytes) -> PackedBlocks:
    """The tensor's codes, unchanged, as `MatMulNBits` wants them. Raises `CheckpointError` for other types."""
    blocks = take_apart(entry, content)
    bits = HALF_BYTE if blocks.code_bits <= HALF_BYTE else 8
    centre = blocks.zero if blocks.minimums is None else 1 << (blocks.code_bits - 1)
    codes: Any = blocks.codes + np.uint8((1 << (bits - 1)) - centre)
    # A minimum counts from code 0, an offset from the centre; rounding this sum to float32 is far below the scale.
    offsets: Any = None if blocks.minimums is None else blocks.minimums + blocks.scales * np.float32(centre)
    if bits == HALF_BYTE:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return PackedBlocks(bits, blocks.codes.shape[-1], codes, blocks.scales, offsets)


def take_apart(entry: TensorEntry, content: Bytes) -> Blocks:
    """Raises `CheckpointError` for a type without blocks, or of unknown ones."""
    unpack = _BLOCKED.get(entry.type)
    if unpack is None:
        known = ", ".join((*_PLAIN, *_BLOCKED))
        raise CheckpointError(
            f"tensor {entry.name!r} has the type {entry.type}, which can't be used; known are {known}"
        )
    return unpack(content, int(np.prod(entry.shape[:-1])))


def held_bytes(entry: TensorEntry) -> int:
    """What `pack` or `dequantize` makes of it, which a runner holds; an unknown type counts as floats."""
    count = math.prod(entry.shape)
    if not is_blocked(entry.type):
        return FLOAT_BYTES * count
    block_size, packed_bytes = _packed_block(entry.type)
    return -(-count // block_size) * packed_bytes


def held_in_table_bytes(entry: TensorEntry) -> int:
    """The same for a table of embeddings."""
    return entry.byte_count if stays_in_table(entry.type) else held_bytes(entry)


def stays_in_table(tensor_type: str) -> bool:
    """Rows of embeddings are looked up and not multiplied, so float16 is as good there as float32."""
    return tensor_type == "F16"


@cache
def _packed_block(tensor_type: str) -> tuple[int, int]:
    """Weights of the smallest piece that a tensor of this type can have, and bytes of that once it is packed."""
    size, byte_count = next((size, count) for name, size, count in TENSOR_TYPES.values() if name == tensor_type)
    packed = pack(TensorEntry("", tensor_type, (1, size), 0, byte_count), np.zeros(byte_count, np.uint8))
    offsets_bytes = 0 if packed.offsets is None else packed.offsets.nbytes
    return size, packed.codes.nbytes + packed.scales.nbytes + offsets_bytes


def is_blocked(tensor_type: str) -> bool:
    return tensor_type in _BLOCKED


def is_known(tensor_type: str) -> bool:
    return tensor_type in _BLOCKED or tensor_type in _PLAIN


def known_types() -> tuple[str, ...]:
    return (*_PLAIN, *_BLOCKED)


def _records(content: Bytes, rows: int, *fields: tuple[str, str, int]) -> Any:
    """The bytes as blocks of the named fields: [rows, blocks] of a structured type, without copying."""
    return content.view(np.dtype([(name, kind, (size,)) for name, kind, size in fields])).reshape(rows, -1)


def _floats(field: Any) -> Floats:
    """A float16 field of one number: [rows, blocks]."""
    return field[..., 0].astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """All low halves of a block, then all high halves."""
    return np.concatenate((packed & np.uint8(15), packed >> np.uint8(4)), axis=-1)


def _fifth_bits(packed: Bytes) -> Bytes:
    """Bit i of a block's 32-bit word, moved to bit 4 of code i."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << np.uint8(4)


def _q4_0(content: Bytes, rows: int) -> Blocks:
    records = _records(content, rows, ("d", "<f2", 1), ("codes", "u1", 16))
    return Blocks(_nibbles(records["codes"]), 4, 8, _floats(records["d"]), None)


def _q4_1(content: Bytes, rows: int) -> Blocks:
    records = _records(content, rows, ("d", "<f2", 1), ("m", "<f2", 1), ("codes", "u1", 16))
    return Blocks(_nibbles(records["codes"]), 4, 0, _floats(records["d"]), _floats(records["m"]))


def _q5_0(content: Bytes, rows: int) -> Blocks:
    records = _records(content, rows, ("d", "<f2", 1), ("fifth", "u1", 4), ("codes", "u1", 16))
    codes = _nibbles(records["codes"]) | _fifth_bits(records["fifth"])
    return Blocks(codes, 5, 16, _floats(records["d"]), None)


def _q5_1(content: Bytes, rows: int) -> Blocks:
    records = _records(content, rows, ("d", "<f2", 1), ("m", "<f2", 1), ("fifth", "u1", 4), ("codes", "u1", 16))
    codes = _nibbles(records["codes"]) | _fifth_bits(records["fifth"])
    return Blocks(codes, 5, 0, _floats(records["d"]), _floats(records["m"]))


def _q8_0(content: Bytes, rows: int) -> Blocks:
    records = _records(content, rows, ("d", "<f2", 1), ("codes", "u1", 32))
    return Blocks(records["codes"] ^ 128, 8, 128, _floats(records["d"]), None)  # signed to unsigned


def _q4_k(content: Bytes, rows: int) -> Blocks:
    records = _records(content, rows, ("d", "<f2", 1), ("dmin", "<f2", 1), ("scales", "u1", 12), ("codes", "u1", 128))
    return _super_blocks(records, _pairs_of_32(records["codes"]), 4)


def _q5_k(content: Bytes, rows: int) -> Blocks:
    records = _records(
        content,
        rows,
        ("d", "<f2", 1),
        ("dmin", "<f2", 1),
        ("scales", "u1", 12),
        ("fifth", "u1", 32),
        ("codes", "u1", 128),
    )
    # Bit b of byte i is the fifth bit of weight i of block b.
    fifth = (records["fifth"][..., np.newaxis, :] >> np.arange(8, dtype=np.uint8)[:, np.newaxis]) & 1
    return _super_blocks(records, _pairs_of_32(records["codes"]) | (fifth << 4), 5)


def _q6_k(content: Bytes, rows: int) -> Blocks:
    records = _records(content, rows, ("low", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), ("d", "<f2", 1))
    low = records["low"].reshape(*records.shape, 2, 64)
    high = records["high"].reshape(*records.shape, 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8)
    codes = _nibbles(low).reshape(*records.shape, 2, 4, 32) | ((high & 3) << 4)
    scales = _floats(records["d"])[..., np.newaxis] * records["scales"].astype(np.float32)
    return Blocks(codes.reshape(rows, -1, 16), 6, 32, scales.reshape(rows, -1), None)


def _pairs_of_32(packed: Bytes) -> Bytes:
    """Four groups of 32 bytes; each holds a block in its low halves and the next block in its high halves."""
    groups = packed.reshape(*packed.shape[:-1], 4, 1, 32)
    return np.concatenate((groups & np.uint8(15), groups >> np.uint8(4)), axis=-2).reshape(*packed.shape[:-1], 8, 32)


def _super_blocks(records: Any, codes: Bytes, code_bits: int) -> Blocks:
    rows = records.shape[0]
    factors, minimum_factors = _six_bit_pairs(records["scales"])
    scales = _floats(records["d"])[..., np.newaxis] * factors
    minimums = -(_floats(records["dmin"])[..., np.newaxis] * minimum_factors)
    return Blocks(codes.reshape(rows, -1, 32), code_bits, 0, scales.reshape(rows, -1), minimums.reshape(rows, -1))


def _six_bit_pairs(packed: Bytes) -> tuple[Floats, Floats]:
    """Eight scales and eight minimums of 6 bits each, out of 12 bytes.

    The first four of each fill the low 6 bits of bytes 0-3 and 4-7; the last four have their low halves in bytes 8-11
    and their upper two bits at the top of bytes 0-3 and 4-7.
    """
    first, second, third = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate((first & 63, (third & 15) | ((first >> 6) << 4)), axis=-1)
    minimums = np.concatenate((second & 63, (third >> 4) | ((second >> 6) << 4)), axis=-1)
    return scales.astype(np.float32), minimums.astype(np.float32)


def _bf16(content: Bytes) -> Floats:
    return (content.view("<u2").astype(np.uint32) << 16).view(np.float32)


_PLAIN: Final[dict[str, Callable[[Bytes], Floats]]] = {
    "F32": lambda content: content.view("<f4").astype(np.float32, copy=False),
    "F16": lambda content: content.view("<f2").astype(np.float32),
    "BF16": _bf16,
}

_BLOCKED: Final[dict[str, Callable[[Bytes, int], Blocks]]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
