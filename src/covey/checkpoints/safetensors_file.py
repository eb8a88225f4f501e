"""Reads the header of a safetensors file, touching nothing else of the file.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the length of what follows, little-endian; that many
bytes of JSON, which give each tensor a type, a shape and its place behind the JSON; then the tensors. Files come from
strangers, as in `gguf_file`.
"""

import itertools
import math
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from covey.checkpoints.checkpoint import FLOATS, CheckpointError, TensorEntry

LENGTH_BYTES: Final = 8
HEADER_BYTES_MAX: Final = 100_000_000  # as in the reference implementation
DIMENSIONS_MAX: Final = 8
SUFFIX: Final = ".safetensors"
ITEM_BITS: Final = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "C64": 64,
}  # fmt: skip

_Count = Annotated[int, Meta(ge=0, le=1 << 62)]


class _Tensor(Struct, frozen=True):
    dtype: str
    shape: Annotated[tuple[_Count, ...], Meta(max_length=DIMENSIONS_MAX)]
    data_offsets: tuple[_Count, _Count]


def read_safetensors(path: Path) -> tuple[dict[str, TensorEntry], int]:
    """The file's tensors by its own names, and its size in bytes. Raises `CheckpointError`, `OSError`."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise CheckpointError(f"{path} is not a regular file")
    with path.open("rb", buffering=0) as file:
        file_bytes = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        try:
            _expect_plausible(length, file_bytes)
            content = file.read(length)
            return _parse(content, path.name, LENGTH_BYTES + length, file_bytes), file_bytes
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None


def _expect_plausible(length: int, file_bytes: int) -> None:
    if file_bytes < LENGTH_BYTES or length > HEADER_BYTES_MAX:
        raise CheckpointError("this is not a safetensors file, or only the beginning of one; fetch it again")
    if LENGTH_BYTES + length > file_bytes:
        raise CheckpointError(
            f"the safetensors file is cut off: its header alone has {length} bytes, the file {file_bytes}; "
            "fetch it again"
        )


def _parse(content: bytes, file: str, data_start: int, file_bytes: int) -> dict[str, TensorEntry]:
    try:
        raw = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        tensors = {name: msgspec.json.decode(each, type=_Tensor) for name, each in raw.items()}
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the safetensors file is damaged: its header can't be read ({error})") from None
    entries = {name: _entry(name, each, file, data_start) for name, each in tensors.items()}
    _check_placement(sorted(entries.values(), key=lambda entry: (entry.offset, entry.byte_count)), file_bytes)
    return entries


def _entry(name: str, tensor: _Tensor, file: str, data_start: int) -> TensorEntry:
    bits = ITEM_BITS.get(tensor.dtype)
    if bits is None:
        raise CheckpointError(
            f"tensor {name!r} is of the type {tensor.dtype!r}, which is not known; Covey runs {', '.join(FLOATS)} "
            "and what MLX, AWQ, GPTQ or MXFP4 made of them"
        )
    start, end = tensor.data_offsets
    byte_count = math.prod(tensor.shape) * bits // 8
    if end - start != byte_count:
        raise CheckpointError(
            f"the safetensors file is damaged: tensor {name!r} of {tensor.dtype} measures {tensor.shape}, which takes "
            f"{byte_count} bytes, but has {end - start}"
        )
    return TensorEntry(name, tensor.dtype, tensor.shape, data_start + start, byte_count, file)


def _check_placement(tensors: list[TensorEntry], file_bytes: int) -> None:
    """No two share bytes, and the file holds them all."""
    for before, after in itertools.pairwise(tensors):
        if before.offset + before.byte_count > after.offset:
            raise CheckpointError(
                f"the safetensors file is damaged: tensors {before.name!r} and {after.name!r} overlap"
            )
    end = tensors[-1].offset + tensors[-1].byte_count if tensors else 0
    if end > file_bytes:
        raise CheckpointError(
            f"the safetensors file is cut off: its tensors need {end} bytes but the file has {file_bytes}; "
            "fetch it again"
        )
