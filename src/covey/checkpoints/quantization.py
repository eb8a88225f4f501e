"""What the types of tensors in model files mean: their exact values, and how a runner holds them.

Types of plain numbers become float32. Types of blocks keep their codes, in the layout that matrix kernels take.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np
from msgspec.structs import replace

from covey.checkpoints.blocks import FLOAT_BYTES, Blocks, Bytes, Floats, Form, PackedBlocks, pack_blocks, values_of
from covey.checkpoints.checkpoint import CheckpointError, TensorEntry
from covey.checkpoints.ggml_blocks import GGML_BLOCKS
from covey.checkpoints.gguf_file import TENSOR_TYPES
from covey.checkpoints.hub_blocks import HUB_BLOCKS, hub_form, take_hub_apart

PIECE_WEIGHTS: Final = 1 << 20  # that are taken apart at a time


def dequantize(entry: TensorEntry, content: Bytes) -> Floats:
    """The tensor's exact values, in its shape. Raises `CheckpointError` for a type that isn't known."""
    if entry.type in _PLAIN:
        return _PLAIN[entry.type](content).reshape(entry.shape)
    return values_of(take_apart(entry, content)).reshape(entry.shape)


def pack(entry: TensorEntry, content: Bytes) -> PackedBlocks:
    """The tensor's codes, unchanged, as `MatMulNBits` wants them. Raises `CheckpointError` for other types.

    Piece by piece where rows lie one after another: taken apart, a weight of half a byte has several.
    """
    rows, step = math.prod(entry.shape[:-1]), max(PIECE_WEIGHTS // entry.shape[-1], 1)
    if entry.type not in GGML_BLOCKS or rows <= step:
        return pack_blocks(take_apart(entry, content))
    packed: PackedBlocks | None = None
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        piece = replace(entry, shape=(part.stop - start, entry.shape[-1]))
        done = pack_blocks(take_apart(piece, content.reshape(rows, -1)[part].reshape(-1)))
        packed = packed or _room_for(done, rows)
        _put(done, packed, part)
    assert packed is not None
    return packed


def _room_for(piece: PackedBlocks, rows: int) -> PackedBlocks:
    def room(part: Any) -> Any:
        return None if part is None else np.empty((rows, *part.shape[1:]), part.dtype)

    return replace(piece, codes=room(piece.codes), scales=room(piece.scales), offsets=room(piece.offsets))


def _put(piece: PackedBlocks, packed: PackedBlocks, rows: slice) -> None:
    packed.codes[rows], packed.scales[rows] = piece.codes, piece.scales
    if packed.offsets is not None:
        packed.offsets[rows] = piece.offsets


def take_apart(entry: TensorEntry, content: Bytes) -> Blocks:
    """Raises `CheckpointError` for a type without blocks, or of unknown ones."""
    if entry.type in HUB_BLOCKS:
        return take_hub_apart(entry, content)
    if entry.type in GGML_BLOCKS:
        return GGML_BLOCKS[entry.type](content, math.prod(entry.shape[:-1]))
    raise CheckpointError(
        f"tensor {entry.name!r} has the type {entry.type}, which can't be used; known are {', '.join(known_types())}"
    )


def form_of(entry: TensorEntry) -> Form | None:
    """How `pack` lets it be held; None for what is held as floats. Raises `CheckpointError`."""
    if entry.type in HUB_BLOCKS:
        return hub_form(entry)
    return _ggml_form(entry.type) if entry.type in GGML_BLOCKS else None


def held_bytes(entry: TensorEntry, *, is_multiplied: bool = True) -> int:
    """What a runner holds of it, as `pack` or `dequantize` and a kernel make it; an unknown type counts as floats."""
    form, count = form_of(entry), math.prod(entry.shape)
    return FLOAT_BYTES * count if form is None else form.byte_count(count, is_multiplied=is_multiplied)


def spared_bytes(entry: TensorEntry) -> int:
    """What exact mode holds less of it."""
    form = form_of(entry)
    return 0 if form is None else form.spared_bytes(math.prod(entry.shape))


def held_in_table_bytes(entry: TensorEntry) -> int:
    """The same for a table of embeddings."""
    return entry.byte_count if stays_in_table(entry.type) else held_bytes(entry, is_multiplied=False)


def stays_in_table(tensor_type: str) -> bool:
    """Rows of embeddings are looked up and not multiplied, so float16 is as good there as float32."""
    return tensor_type == "F16"


@cache
def _ggml_form(tensor_type: str) -> Form:
    """That of the smallest piece that a tensor of this type can have."""
    size, byte_count = next((size, count) for name, size, count in TENSOR_TYPES.values() if name == tensor_type)
    packed = pack(TensorEntry("", tensor_type, (1, size), 0, byte_count), np.zeros(byte_count, np.uint8))
    return Form(packed.bits, packed.block_size, packed.offsets is not None)


def is_blocked(tensor_type: str) -> bool:
    return tensor_type in GGML_BLOCKS or tensor_type in HUB_BLOCKS


def is_known(tensor_type: str) -> bool:
    return is_blocked(tensor_type) or tensor_type in _PLAIN


def known_types() -> tuple[str, ...]:
    return (*_PLAIN, *GGML_BLOCKS, *HUB_BLOCKS)


def _bf16(content: Bytes) -> Floats:
    return (content.view("<u2").astype(np.uint32) << 16).view(np.float32)


_PLAIN: Final[dict[str, Callable[[Bytes], Floats]]] = {
    "F32": lambda content: content.view("<f4").astype(np.float32, copy=False),
    "F16": lambda content: content.view("<f2").astype(np.float32),
    "BF16": _bf16,
}
