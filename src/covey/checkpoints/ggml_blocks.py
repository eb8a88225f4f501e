"""The block formats of GGUF tensors, taken apart.

All of them store rows of blocks with a small code for each weight, and for each block a scale and in some formats a
minimum. The layouts are those of ggml's `ggml-common.h`
(https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h). The types whose names end in K pack several blocks
into a super-block of 256 weights whose scales are themselves small integers times a float16. The codes of IQ4_NL,
IQ4_XS and MXFP4 stand for values of a book; these are whole numbers below 128, so that a byte holds them exactly.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from covey.checkpoints.blocks import Blocks, Bytes, Floats

BOOK_ZERO: Final = 128  # the code that stands for the value 0 of a book


def _book(values: tuple[int, ...]) -> Bytes:
    return np.array([value + BOOK_ZERO for value in values], np.uint8)


_IQ4_BOOK: Final = _book((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))
# Twice the values of the OCP microscaling specification's E2M1 (version 1.0, 5.3.3): a sign, 2 bits of exponent, 1 of
# mantissa.
MXFP4_BOOK: Final = _book((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12))


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


def _iq4_nl(content: Bytes, rows: int) -> Blocks:
    records = _records(content, rows, ("d", "<f2", 1), ("codes", "u1", 16))
    return Blocks(_IQ4_BOOK[_nibbles(records["codes"])], 8, BOOK_ZERO, _floats(records["d"]), None)


def _iq4_xs(content: Bytes, rows: int) -> Blocks:
    fields = ("d", "<f2", 1), ("high", "<u2", 1), ("low", "u1", 4), ("codes", "u1", 128)
    records = _records(content, rows, *fields)
    low = np.stack((records["low"] & 15, records["low"] >> 4), axis=-1).reshape(*records.shape, 8)
    high = (records["high"] >> np.arange(0, 16, 2, dtype=np.uint16)) & 3
    factors = (low | (high << 4)).astype(np.float32) - 32
    codes = _nibbles(records["codes"].reshape(*records.shape, 8, 16))
    scales = _floats(records["d"])[..., np.newaxis] * factors
    return Blocks(_IQ4_BOOK[codes].reshape(rows, -1, 32), 8, BOOK_ZERO, scales.reshape(rows, -1), None)


def _mxfp4(content: Bytes, rows: int) -> Blocks:
    records = _records(content, rows, ("exponent", "u1", 1), ("codes", "u1", 16))
    scales = mxfp4_scales(records["exponent"][..., 0])
    return Blocks(MXFP4_BOOK[_nibbles(records["codes"])], 8, BOOK_ZERO, scales, None)


def mxfp4_scales(exponents: Bytes) -> Floats:
    """Powers of two, halved, since the values of the book are doubled."""
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - 128).astype(np.float32)


def _q2_k(content: Bytes, rows: int) -> Blocks:
    fields = ("scales", "u1", 16), ("codes", "u1", 64), ("d", "<f2", 1), ("dmin", "<f2", 1)
    records = _records(content, rows, *fields)
    scales = _floats(records["d"])[..., np.newaxis] * (records["scales"] & 15).astype(np.float32)
    minimums = -(_floats(records["dmin"])[..., np.newaxis] * (records["scales"] >> 4).astype(np.float32))
    codes = _quarters(records["codes"]).reshape(rows, -1, 16)
    return Blocks(codes, 2, 0, scales.reshape(rows, -1), minimums.reshape(rows, -1))


def _q3_k(content: Bytes, rows: int) -> Blocks:
    fields = ("third", "u1", 32), ("codes", "u1", 64), ("scales", "u1", 12), ("d", "<f2", 1)
    records = _records(content, rows, *fields)
    # Bit b of byte i is the third bit of weight i of the 32 from 32 * b on.
    third = (records["third"][..., np.newaxis, :] >> np.arange(8, dtype=np.uint8)[:, np.newaxis]) & 1
    codes = (_quarters(records["codes"]) | (third << 2)).reshape(rows, -1, 16)
    scales = _floats(records["d"])[..., np.newaxis] * (_six_bits(records["scales"]).astype(np.float32) - 32)
    return Blocks(codes, 3, 4, scales.reshape(rows, -1), None)


def _quarters(packed: Bytes) -> Bytes:
    """Two groups of 32 bytes; each holds four times 32 codes of 2 bits, the first in its lowest bits."""
    groups: Any = packed.reshape(*packed.shape[:-1], 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8)
    return (groups & 3).reshape(*packed.shape[:-1], 8, 32)


def _six_bits(packed: Bytes) -> Bytes:
    """Sixteen numbers of 6 bits: the low halves are the nibbles of 8 bytes, the upper 2 bits lie in 4 more."""
    low = _nibbles(packed[..., :8])
    high: Any = packed[..., np.newaxis, 8:] >> np.array([[0], [2], [4], [6]], np.uint8)
    return low | ((high & 3) << 4).reshape(low.shape)


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


GGML_BLOCKS: Final[dict[str, Callable[[Bytes, int], Blocks]]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
