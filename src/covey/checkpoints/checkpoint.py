"""What any model file or folder comes down to: metadata, and tensors with the places of their bytes.

The vocabulary is that of the GGUF specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), whatever
the format: keys such as `llama.block_count`, tensors such as `blk.3.attn_q.weight`. Three keys for the engine are ours,
since GGUF files have no need of them: `covey.rotary_interleaved` (false where the halves of a head are rotated against
each other, though GGUF files of the architecture rotate neighbours), `covey.norm_offset` (what is to be added to the
weights of the norms) and `covey.rotary_layers` (for each layer whether positions turn anything).
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

EMBEDDING: Final = "token_embd.weight"
OUTPUT: Final = "output.weight"  # a file without it uses the embedding's
FLOATS: Final = ("F32", "F16", "BF16")  # the types of plain numbers that can be computed with


class CheckpointError(Exception):
    """A model file can't be used; the message is one sentence for a person."""


class TensorEntry(Struct, frozen=True):
    """Where one tensor lies, and what its bytes are."""

    name: str
    type: str  # for example "Q4_1"
    shape: tuple[int, ...]  # NumPy's order: (rows out, columns in)
    offset: int  # from the start of the file
    byte_count: int  # that are read for it
    file: str = ""  # its name in the folder; nothing where the checkpoint is one file
    parts: tuple["TensorEntry", ...] = ()  # what a folder stores instead, one after another
    woven: tuple[int, int] | None = (
        None  # (i, n): of n tensors whose rows (second axis) alternate in the file, this is i
    )
    is_transposed: bool = False  # in the file the last two axes are exchanged
    given: bytes | None = None  # the content, where no file has it


class Checkpoint(Struct, frozen=True):
    metadata: dict[str, Any]  # numbers, strings, booleans and lists of them
    tensors: dict[str, TensorEntry]
    file_bytes: int


class TensorReader:
    """Reads tensors of the file or folder at `path`, and no other byte of it."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._files: dict[str, BinaryIO] = {}
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._open.close()

    def read(self, entry: TensorEntry) -> NDArray[np.uint8]:
        """The tensor's bytes, those of its parts one after another. Raises `CheckpointError`, `OSError`."""
        if entry.given is not None:
            return np.frombuffer(entry.given, np.uint8)
        if not entry.parts:
            return self._read_one(entry)
        if not any(part.woven or part.is_transposed for part in entry.parts):
            return self._read_parts(entry)
        return np.concatenate([self._read_one(part) for part in entry.parts])

    def read_rows(self, entry: TensorEntry, ranges: Sequence[range]) -> NDArray[np.uint8]:
        """The bytes of these rows, of a tensor that `has_rows`; those of several matrices count on. Raises
        `CheckpointError`, `OSError`.
        """
        row_bytes = entry.byte_count // math.prod(entry.shape[:-1])
        content = np.empty(sum(map(len, ranges)) * row_bytes, np.uint8)
        filled = 0
        for each in ranges:
            place = replace(entry, offset=entry.offset + each.start * row_bytes, byte_count=len(each) * row_bytes)
            _fill(self._file(entry.file), place, content[filled : filled + place.byte_count])
            filled += place.byte_count
        return content

    def _read_parts(self, entry: TensorEntry) -> NDArray[np.uint8]:
        """Straight into one array: a mixture's experts are many parts, and large together."""
        content = np.empty(entry.byte_count, np.uint8)
        filled = 0
        for part in entry.parts:
            _fill(self._file(part.file), part, content[filled : filled + part.byte_count])
            filled += part.byte_count
        return content

    def _read_one(self, entry: TensorEntry) -> NDArray[np.uint8]:
        content = read_tensor(self._file(entry.file), entry)
        index, count = entry.woven or (0, 1)
        if entry.is_transposed:
            matrices, rows, columns = entry.shape
            turned = content.reshape(matrices, columns, rows * count, -1).swapaxes(1, 2)
            return np.ascontiguousarray(turned[:, index::count]).reshape(-1)
        if entry.woven is None:
            return content
        return content.reshape(entry.shape[0], entry.shape[1], count, -1)[:, :, index].reshape(-1)

    def _file(self, name: str) -> BinaryIO:
        if name not in self._files:
            self._files[name] = self._open.enter_context(FileIO(self._path / name if name else self._path))
        return self._files[name]


def has_rows(entry: TensorEntry) -> bool:
    """Whether its rows lie one after another in one file."""
    return entry.given is None and not entry.parts and entry.woven is None and not entry.is_transposed


def read_tensor(file: BinaryIO, entry: TensorEntry) -> NDArray[np.uint8]:
    """Exactly the bytes of the tensor. Raises `CheckpointError` when the file ends within it, `OSError`."""
    content = np.empty(entry.byte_count, np.uint8)
    _fill(file, entry, content)
    return content


def _fill(file: BinaryIO, entry: TensorEntry, content: NDArray[np.uint8]) -> None:
    view = memoryview(content)  # pyright: ignore[reportArgumentType]  # is a buffer, though undeclared before 3.12
    file.seek(entry.offset)
    filled = 0
    while filled < entry.byte_count:
        count = file.readinto(view[filled:])  # pyright: ignore[reportAttributeAccessIssue]  # BinaryIO lacks it
        if not count:
            raise CheckpointError(f"the file ends within its tensor {entry.name!r}; fetch it again")
        filled += count
