"""What a model's tensors are, kind by kind, and how they will be held when they are loaded."""

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from covey.checkpoints.checkpoint import EMBEDDING, OUTPUT, Checkpoint, TensorEntry, TensorReader
from covey.checkpoints.quantization import (
    dequantize,
    form_of,
    held_bytes,
    held_in_table_bytes,
    is_known,
    stays_in_table,
)
from covey.checkpoints.quantizing import BITS, BLOCK_SIZE, can_be_quantized, error_of, quantized_bytes
from covey.schema.model import Quantizing

_LAYER: Final = re.compile(r"blk\.\d+\.")


class TensorKind(Struct, frozen=True):
    """Tensors of one name in all layers, of one type and shape."""

    name: str  # with a star for the layer's number
    type: str
    shape: tuple[int, ...]
    count: int
    file_bytes: int  # of all
    held_bytes: int
    held_as: str
    error: float | None = None  # of quantising it, as `error_of` gives it; None where it is held as it is


def kinds_of(header: Checkpoint) -> list[TensorKind]:
    """In the order of the file, as all is held without quantising: exactly, or not at all. Raises `CheckpointError`."""
    return _kinds(header, _kind)


def quantized_kinds(header: Checkpoint, reader: TensorReader, quantize: Quantizing) -> list[TensorKind]:
    """The same, if matrices in full precision were made small; the first of each kind is read and measured.

    Raises `CheckpointError`, `OSError`.
    """
    return _kinds(header, partial(_quantized, reader=reader, bits=BITS[quantize]))


def _kinds(header: Checkpoint, kind_of: Callable[[list[TensorEntry]], TensorKind]) -> list[TensorKind]:
    """A tied embedding comes twice: runners hold it as a table, and as the matrix of the output."""
    kinds = [kind_of(entries) for entries in _groups(header.tensors.values())]
    embedding = header.tensors.get(EMBEDDING)
    if embedding is None or OUTPUT in header.tensors:
        return kinds
    tied = kind_of([replace(embedding, name=OUTPUT)])
    return [*kinds, replace(tied, file_bytes=0, held_as=f"{tied.held_as}, the embedding's again")]


def _groups(entries: Iterable[TensorEntry]) -> list[list[TensorEntry]]:
    groups: dict[tuple[str, str, tuple[int, ...]], list[TensorEntry]] = {}
    for entry in entries:
        groups.setdefault((_LAYER.sub("blk.*.", entry.name), entry.type, entry.shape), []).append(entry)
    return list(groups.values())


def _kind(entries: list[TensorEntry]) -> TensorKind:
    first = entries[0]
    held = held_in_table_bytes(first) if first.name == EMBEDDING else held_bytes(first)
    return TensorKind(
        name=_LAYER.sub("blk.*.", first.name),
        type=first.type,
        shape=first.shape,
        count=len(entries),
        file_bytes=sum(entry.byte_count for entry in entries),
        held_bytes=len(entries) * held,
        held_as=_held_as(first),
    )


def _held_as(entry: TensorEntry) -> str:
    form = form_of(entry)
    if form is not None:
        return f"exact: {form.bits}-bit codes in blocks of {form.block_size}" + (
            " with offsets" if form.has_offsets else ""
        )
    if not is_known(entry.type):
        return "can't be used"
    return "exact: float16" if entry.name == EMBEDDING and stays_in_table(entry.type) else "exact: float32"


def _quantized(entries: list[TensorEntry], reader: TensorReader, bits: int) -> TensorKind:
    first, kind = entries[0], _kind(entries)
    if not can_be_quantized(first):
        return kind
    return replace(
        kind,
        held_bytes=len(entries) * quantized_bytes(first, bits, is_multiplied=first.name != EMBEDDING),
        held_as=f"rounded: {bits}-bit codes in blocks of {BLOCK_SIZE}",
        error=error_of(dequantize(first, reader.read(first)), bits),
    )
