"""Reads the header of a GGUF file, touching nothing else of the file.

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
Files come from strangers: every length is checked against the file's size before anything is allocated, and whatever
is wrong with a file ends in a `CheckpointError`. What the numbers in a tensor mean is `quantization`'s knowledge.
"""

import itertools
import struct
from collections.abc import Callable
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, Final

import numpy as np
from msgspec import Struct

from covey.checkpoints.checkpoint import FLOATS, Checkpoint, CheckpointError, TensorEntry
from covey.checkpoints.ggml_blocks import GGML_BLOCKS

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
ALIGNMENT_BYTES_DEFAULT: Final = 32
ALIGNMENT_BYTES_MAX: Final = 1 << 20
HEADER_BYTES_MAX: Final = 512 * 1024 * 1024  # the largest vocabularies take under 20 MB
READ_BYTES: Final = 1024 * 1024  # of one read; one or two hold the header of small vocabularies
LENGTH: Final = struct.Struct("<Q")  # of a text, in bytes
NAME_BYTES_MAX: Final = 65535  # of a metadata key, by the specification; tensor names are shorter still
DIMENSIONS_MAX: Final = 4
ARRAY_DEPTH_MAX: Final = 4

# Name of each tensor type, with its number in the file: elements in a block and bytes of a block.
TENSOR_TYPES: Final[dict[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}

_STRING: Final = 8
_ARRAY: Final = 9
_BOOLEAN: Final = 7
# Metadata value types of a fixed size, as NumPy names them.
_NUMBERS: Final[dict[int, np.dtype[Any]]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOLEAN: np.dtype("<u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}


class HeaderIncompleteError(CheckpointError):
    """The data ends before the header does, though the file goes on: `bytes_needed` or more are needed."""

    def __init__(self, bytes_needed: int) -> None:
        super().__init__(f"the header of the GGUF file needs at least {bytes_needed} bytes")
        self.bytes_needed = bytes_needed


ReadOn = Callable[[int], bytes]  # gives the next bytes of the file, at least so many


class _Cursor:
    """Walks through the header once; every step is checked against the size of the file. It sees a window of it, which
    `read_on` moves; without that, all is there that ever will be.
    """

    def __init__(self, data: bytes | memoryview, file_bytes: int, read_on: ReadOn | None = None) -> None:
        self.file_bytes = file_bytes
        self.position = 0
        self._window = memoryview(data)
        self._window_start = 0
        self._read_on = read_on

    def take(self, byte_count: int) -> memoryview:
        start = self.position - self._window_start
        if start + byte_count > len(self._window):
            self._move_window(byte_count)
            start = 0
        self.position += byte_count
        return self._window[start : start + byte_count]

    def _move_window(self, byte_count: int) -> None:
        """Lets it begin at the position and hold `byte_count` or more."""
        end = self.position + byte_count
        self._refuse_long(end)
        if self._read_on is None:
            raise HeaderIncompleteError(end)
        rest = self._window[self.position - self._window_start :]
        self._window = memoryview(bytes(rest) + self._read_on(byte_count - len(rest)))
        self._window_start = self.position

    def _refuse_long(self, end: int) -> None:
        if end > self.file_bytes:
            raise CheckpointError(
                f"the GGUF file is damaged or cut off: its header reaches beyond the end of the file "
                f"({self.file_bytes} bytes); fetch it again"
            )
        if end > HEADER_BYTES_MAX:
            raise CheckpointError(
                f"the GGUF file is damaged: its header claims over {HEADER_BYTES_MAX} bytes; fetch it again"
            )

    def uint32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def uint64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def text(self) -> str:
        # Single tokens of some vocabularies are no valid UTF-8, which must not make the file useless.
        return str(self.take(self.uint64()), "utf-8", "replace")

    def name(self) -> str:
        byte_count = self.uint64()
        if byte_count > NAME_BYTES_MAX:
            raise CheckpointError(f"the GGUF file is damaged: a name in its header claims {byte_count} bytes")
        return str(self.take(byte_count), "utf-8", "replace")

    def texts(self, count: int) -> list[str]:
        """The bulk of the header's time: a few 100,000 tokens and merges."""
        self._expect_room(count, LENGTH.size)
        found = self._texts_in_window(count)
        while len(found) < count:
            found.append(self.text())  # moves the window
            found += self._texts_in_window(count - len(found))
        return found

    def _texts_in_window(self, count: int) -> list[str]:
        """Those of the next `count` that end in it."""
        found: list[str] = []
        window, start, end = self._window, self.position - self._window_start, len(self._window)
        while len(found) < count and start + LENGTH.size <= end:
            content = start + LENGTH.size
            stop = content + LENGTH.unpack_from(window, start)[0]
            if stop > end:
                break
            found.append(str(window[content:stop], "utf-8", "replace"))
            start = stop
        self.position = self._window_start + start
        return found

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array(depth + 1)
        return self.numbers(kind, 1)[0]

    def array(self, depth: int) -> list[Any]:
        if depth > ARRAY_DEPTH_MAX:
            raise CheckpointError("the GGUF file is damaged: its metadata holds lists nested too deep")
        kind, count = self.uint32(), self.uint64()
        if kind == _STRING:
            return self.texts(count)
        if kind == _ARRAY:
            self._expect_room(count, 12)
            return [self.array(depth + 1) for _ in range(count)]
        return self.numbers(kind, count)

    def numbers(self, kind: int, count: int) -> list[Any]:
        dtype = _NUMBERS.get(kind)
        if dtype is None:
            raise CheckpointError(f"the GGUF file is damaged: its metadata holds a value of unknown type {kind}")
        values: list[Any] = np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        return [bool(value) for value in values] if kind == _BOOLEAN else values

    def _expect_room(self, count: int, item_bytes_min: int) -> None:
        """Refuses a count that the rest of the file can't hold, before it is believed."""
        if self.position + count * item_bytes_min > min(self.file_bytes, HEADER_BYTES_MAX):
            raise CheckpointError(
                f"the GGUF file is damaged or cut off: its header announces {count} entries, more than it can hold; "
                "fetch it again"
            )

    def counted(self, count: int, item_bytes_min: int, read: Callable[[], tuple[str, Any]]) -> dict[str, Any]:
        """`count` named entries; a name must not come twice."""
        self._expect_room(count, item_bytes_min)
        entries: dict[str, Any] = {}
        for _ in range(count):
            name, entry = read()
            if name in entries:
                raise CheckpointError(f"the GGUF file is damaged: {name!r} is in its header twice")
            entries[name] = entry
        return entries


def parse_header(data: bytes | memoryview, file_bytes: int) -> Checkpoint:
    """The header at the start of a file of `file_bytes`, of which `data` is the beginning.

    Raises `HeaderIncompleteError` when `data` ends too early but the file goes on, else `CheckpointError`.
    """
    return _parse(_Cursor(data, file_bytes))


def _parse(cursor: _Cursor) -> Checkpoint:
    file_bytes = cursor.file_bytes
    _expect_version(cursor)
    tensor_count, metadata_count = cursor.uint64(), cursor.uint64()
    metadata = cursor.counted(metadata_count, 13, lambda: (cursor.name(), cursor.value(cursor.uint32())))
    entries = cursor.counted(tensor_count, 32, lambda: _read_entry(cursor))
    tensors = _place(entries, _data_start(cursor.position, metadata), metadata, file_bytes)
    return Checkpoint(metadata, tensors, file_bytes)


def read_header(path: str | Path) -> Checkpoint:
    """Reads no more of the file than its header needs. Raises `CheckpointError`, `OSError`."""
    if Path(path).exists() and not Path(path).is_file():  # a pipe would be waited for
        raise CheckpointError("it is not a regular file")
    with Path(path).open("rb", buffering=0) as file:
        file_bytes = file.seek(0, 2)
        file.seek(0)
        try:
            return _parse(_Cursor(b"", file_bytes, partial(_read_on, file)))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None


def _read_on(file: FileIO, byte_count: int) -> bytes:
    data = bytearray()
    while len(data) < byte_count:
        piece = file.read(max(READ_BYTES, byte_count) - len(data))
        if not piece:
            raise CheckpointError("the GGUF file became shorter while it was read")
        data += piece
    return bytes(data)


def _expect_version(cursor: _Cursor) -> None:
    if cursor.file_bytes < len(MAGIC) or bytes(cursor.take(len(MAGIC))) != MAGIC:
        raise CheckpointError("this is not a GGUF file (it does not begin with the letters GGUF)")
    raw = cursor.take(4)
    version = int.from_bytes(raw, "little")
    if version not in VERSIONS:
        if int.from_bytes(raw, "big") in VERSIONS:
            raise CheckpointError("this GGUF file is big-endian; only little-endian files can be read")
        raise CheckpointError(f"this GGUF file has version {version}; versions 2 and 3 can be read")


class _RawEntry(Struct, frozen=True):
    type: int
    dimensions: tuple[int, ...]  # the file's order: columns first
    offset: int  # from the start of the data


def _read_entry(cursor: _Cursor) -> tuple[str, _RawEntry]:
    name = cursor.name()
    dimension_count = cursor.uint32()
    if not 1 <= dimension_count <= DIMENSIONS_MAX:
        raise CheckpointError(f"the GGUF file is damaged: tensor {name!r} has {dimension_count} dimensions")
    dimensions = struct.unpack(f"<{dimension_count}Q", cursor.take(8 * dimension_count))
    kind, offset = cursor.uint32(), cursor.uint64()
    return name, _RawEntry(kind, dimensions, offset)


def _data_start(header_end: int, metadata: dict[str, Any]) -> int:
    alignment = _alignment(metadata)
    return -(-header_end // alignment) * alignment


def _alignment(metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", ALIGNMENT_BYTES_DEFAULT)
    if not isinstance(alignment, int) or not 1 <= alignment <= ALIGNMENT_BYTES_MAX:
        raise CheckpointError(f"the GGUF file is damaged: it states an alignment of {alignment!r}")
    return alignment


def _place(
    entries: dict[str, _RawEntry], data_start: int, metadata: dict[str, Any], file_bytes: int
) -> dict[str, TensorEntry]:
    alignment = _alignment(metadata)
    tensors = {name: _entry(name, raw, data_start, alignment) for name, raw in entries.items()}
    _check_placement(sorted(tensors.values(), key=lambda tensor: tensor.offset), file_bytes)
    return tensors


def _entry(name: str, raw: _RawEntry, data_start: int, alignment: int) -> TensorEntry:
    if raw.type not in TENSOR_TYPES:
        runnable = ", ".join((*FLOATS, *GGML_BLOCKS))
        raise CheckpointError(
            f"tensor {name!r} is of type number {raw.type}, which is not known; Covey runs {runnable}"
        )
    type_name, block_elements, block_bytes = TENSOR_TYPES[raw.type]
    if raw.dimensions[0] % block_elements or 0 in raw.dimensions:
        raise CheckpointError(f"the GGUF file is damaged: tensor {name!r} of {type_name} measures {raw.dimensions}")
    if raw.offset % alignment:
        raise CheckpointError(f"the GGUF file is damaged: tensor {name!r} does not begin at a multiple of {alignment}")
    element_count = 1
    for dimension in raw.dimensions:
        element_count *= dimension
    byte_count = element_count // block_elements * block_bytes
    return TensorEntry(name, type_name, raw.dimensions[::-1], data_start + raw.offset, byte_count)


def _check_placement(tensors: list[TensorEntry], file_bytes: int) -> None:
    """No two share bytes, and the file holds them all."""
    for before, after in itertools.pairwise(tensors):
        if before.offset + before.byte_count > after.offset:
            raise CheckpointError(f"the GGUF file is damaged: tensors {before.name!r} and {after.name!r} overlap")
    end = tensors[-1].offset + tensors[-1].byte_count if tensors else 0
    if end > file_bytes:
        raise CheckpointError(
            f"the GGUF file is cut off: its tensors need {end} bytes but the file has {file_bytes}; fetch it again"
        )
