"""The block formats of Hugging Face folders, taken apart.

* MLX (`mlx.core.quantize`): of each group of weights in a row `weight = scale * code + bias`. The codes of a row are
  one stream of bits, lowest first, in words of 32.
* AWQ (AutoAWQ's "gemm"): `weight = scale * (code - zero)`, transposed: [columns in, rows out / 8]. The eight codes of
  a word are those of rows 0, 2, 4, 6, 1, 3, 5, 7, from its lowest bits on; so are the zeros.
* GPTQ (AutoGPTQ, GPTQModel): the same formula, transposed: [columns in / 8, rows out], eight columns to a word in
  order. Zeros are stored less 1, but not in its second version. `g_idx` says which group a column belongs to.
* MXFP4 as gpt-oss has it (OCP's microscaling specification 1.0): two codes to a byte, first in the low half, and a
  power of two for each 32 weights.
"""

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from msgspec import Struct

from covey.checkpoints.blocks import Blocks, Bytes, Floats, Form
from covey.checkpoints.checkpoint import CheckpointError, TensorEntry
from covey.checkpoints.ggml_blocks import BOOK_ZERO, MXFP4_BOOK, mxfp4_scales

KERNEL_BLOCKS: Final = (16, 32, 64, 128, 256)
SPLIT_BLOCK_MAX: Final = 128  # of groups that the kernel has no block for
_AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
_DTYPES: Final = {"U32": "<u4", "I32": "<u4", "U8": "u1", "F16": "<f2", "F32": "<f4", "BF16": "<u2"}


class _Format(Struct, frozen=True):
    code_bits: int
    part_count: int  # tensors of one matrix, at the least
    has_minimums: bool
    take_apart: Callable[..., Blocks]  # is given the parts


def hub_form(entry: TensorEntry) -> Form:
    """How it is held once it is packed."""
    form = HUB_BLOCKS[entry.type]
    return Form(4 if form.code_bits <= 4 else 8, _block_size(entry), form.has_minimums)  # noqa: PLR2004  # half a byte


def take_hub_apart(entry: TensorEntry, content: Bytes) -> Blocks:
    """Raises `CheckpointError` for an order of columns that blocks don't allow."""
    form = HUB_BLOCKS[entry.type]
    arrays = _arrays(entry, content)
    matrix_count = entry.shape[0] if len(entry.shape) > 2 and len(arrays) >= 2 * form.part_count else 1  # noqa: PLR2004
    per_matrix = len(arrays) // matrix_count
    each = [form.take_apart(*arrays[at : at + per_matrix]) for at in range(0, len(arrays), per_matrix)]
    return _in_kernel_blocks(_below_one_another(each), _block_size(entry))


def _block_size(entry: TensorEntry) -> int:
    """Weights of a block: those of a group, or as many of them as the kernel can take."""
    scales = next(part for part in entry.parts if part.name.endswith("scales"))
    is_transposed = entry.type not in _BY_ROWS
    group = entry.shape[-1] // (scales.shape[0] if is_transposed else scales.shape[-1])
    if group in KERNEL_BLOCKS:
        return group
    block = math.gcd(group, SPLIT_BLOCK_MAX)
    if block not in KERNEL_BLOCKS:
        raise CheckpointError(f"{entry.name!r} has groups of {group} weights, which the kernels can't take in blocks")
    return block


def _arrays(entry: TensorEntry, content: Bytes) -> list[Any]:
    """The content as the parts that it came from."""
    arrays: list[Any] = []
    at = 0
    for part in entry.parts:
        dtype = np.dtype(_DTYPES[part.type])
        end = at + math.prod(part.shape) * dtype.itemsize
        array: Any = content[at:end].view(dtype).reshape(part.shape)
        arrays.append((array.astype(np.uint32) << 16).view(np.float32) if part.type == "BF16" else array)
        at = end
    return arrays


def _below_one_another(each: list[Blocks]) -> Blocks:
    """The experts of a mixture."""
    if len(each) == 1:
        return each[0]
    minimums = [blocks.minimums for blocks in each if blocks.minimums is not None]
    return Blocks(
        np.concatenate([blocks.codes for blocks in each]),
        each[0].code_bits,
        each[0].zero,
        np.concatenate([blocks.scales for blocks in each]),
        np.concatenate(minimums) if minimums else None,
    )


def _in_kernel_blocks(blocks: Blocks, size: int) -> Blocks:
    """Groups that no block can be as large as become several blocks of the same scale."""
    rows, _, group = blocks.codes.shape
    if group == size:
        return blocks
    times = group // size
    minimums: Any = None if blocks.minimums is None else np.repeat(blocks.minimums, times, axis=1)
    scales: Floats = np.repeat(blocks.scales, times, axis=1)
    return Blocks(blocks.codes.reshape(rows, -1, size), blocks.code_bits, blocks.zero, scales, minimums)


def _mlx(bits: int) -> Callable[..., Blocks]:
    def take_apart(words: Any, scales: Any, biases: Any) -> Blocks:
        groups = scales.shape[-1]
        codes = _from_bits(words, bits)
        rows = codes.size // (codes.shape[-1])
        return Blocks(
            codes.reshape(rows, groups, -1),
            bits,
            0,
            scales.astype(np.float32).reshape(rows, groups),
            biases.astype(np.float32).reshape(rows, groups),
        )

    return take_apart


def _from_bits(words: Any, bits: int) -> Bytes:
    """[..., words of 32 bits] to [..., codes]: as many bytes at a time as hold whole codes."""
    size = math.lcm(bits, 8) // 8
    packed = words.view(np.uint8).reshape(*words.shape[:-1], -1, size)
    joined: Any = np.zeros(packed.shape[:-1], np.uint8 if size == 1 else np.uint64)
    for i in range(size):
        joined |= packed[..., i].astype(joined.dtype) << joined.dtype.type(8 * i)
    shifts = np.arange(0, 8 * size, bits, dtype=joined.dtype)
    codes: Any = (joined[..., np.newaxis] >> shifts) & joined.dtype.type((1 << bits) - 1)
    return codes.astype(np.uint8).reshape(*words.shape[:-1], -1)


def _awq(words: Any, zero_words: Any, scales: Any) -> Blocks:
    return _transposed(_awq_codes(words), _awq_codes(zero_words), scales)


def _awq_codes(words: Any) -> Bytes:
    """[n, rows / 8] to [n, rows]."""
    nibbles = _from_bits(words, 4).reshape(*words.shape, 8)
    codes = np.empty_like(nibbles)
    codes[..., _AWQ_ORDER] = nibbles
    return codes.reshape(words.shape[0], -1)


def _gptq(stored_less: int) -> Callable[..., Blocks]:
    def take_apart(words: Any, zero_words: Any, scales: Any, order: Any = None) -> Blocks:
        columns = 8 * words.shape[0]
        _expect_in_order(order, columns, columns // scales.shape[0])
        nibbles = _from_bits(words, 4).reshape(*words.shape, 8)
        codes = nibbles.transpose(0, 2, 1).reshape(columns, -1)
        # Zeros are codes, from 0 to 15, so that 0 was stored as the 4 bits of -1.
        zeros = (_from_bits(zero_words, 4) + np.uint8(stored_less)) & 15
        return _transposed(codes, zeros, scales)

    return take_apart


def _expect_in_order(order: Any, columns: int, group: int) -> None:
    if order is not None and not np.array_equal(order, np.arange(columns) // group):
        raise CheckpointError(
            "gptq reordered the columns of this model (act-order), which can't be computed in blocks; take a version "
            "without it"
        )


def _transposed(codes: Bytes, zeros: Any, scales: Any) -> Blocks:
    """From codes [columns, rows], zeros and scales [groups, rows]. A zero of each group is a minimum, exactly: the
    product of a half float and a small number has room in a float.
    """
    groups, rows = scales.shape
    by_row: Floats = np.ascontiguousarray(scales.astype(np.float32).T)
    minimums: Any = -by_row * zeros.astype(np.float32).T
    return Blocks(np.ascontiguousarray(codes.T).reshape(rows, groups, -1), 4, 0, by_row, minimums)


def _mxfp4_pairs(words: Any, exponents: Any) -> Blocks:
    groups = exponents.shape[-1]
    packed = words.reshape(-1).view(np.uint8).reshape(-1, groups, 16)
    codes = np.stack((packed & 15, packed >> 4), axis=-1).reshape(-1, groups, 32)
    return Blocks(MXFP4_BOOK[codes], 8, BOOK_ZERO, mxfp4_scales(exponents.reshape(-1, groups)), None)


HUB_BLOCKS: Final[dict[str, _Format]] = {
    **{f"MLX_{bits}": _Format(bits, 3, has_minimums=True, take_apart=_mlx(bits)) for bits in (2, 3, 4, 5, 6, 8)},
    "AWQ_4": _Format(4, 3, has_minimums=True, take_apart=_awq),
    "GPTQ_4": _Format(4, 3, has_minimums=True, take_apart=_gptq(stored_less=1)),
    "GPTQ_V2_4": _Format(4, 3, has_minimums=True, take_apart=_gptq(stored_less=0)),
    "MXFP4_PAIRS": _Format(8, 2, has_minimums=False, take_apart=_mxfp4_pairs),
}
_BY_ROWS: Final = frozenset(name for name in HUB_BLOCKS if name.startswith(("MLX", "MXFP4")))
