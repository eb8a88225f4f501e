"""Takes some rows or columns of a matrix, also of one in blocks."""

import math
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from covey.checkpoints.blocks import PackedBlocks
from covey.checkpoints.ranks import COLUMNS

Floats = NDArray[np.float32]
Matrix = PackedBlocks | Floats  # [rows out, columns in]
Table = PackedBlocks | Floats | NDArray[np.float16]  # of token embeddings: [vocabulary, hidden]


@overload
def rows_of(matrix: Matrix, ranges: Sequence[range]) -> Matrix: ...
@overload
def rows_of(matrix: Table, ranges: Sequence[range]) -> Table: ...
def rows_of(matrix: Table, ranges: Sequence[range]) -> Table:
    """One range is taken without copying."""
    if not isinstance(matrix, PackedBlocks):
        return _taken(matrix, ranges)
    offsets = None if matrix.offsets is None else _taken(matrix.offsets, ranges)
    return replace(matrix, codes=_taken(matrix.codes, ranges), scales=_taken(matrix.scales, ranges), offsets=offsets)


def columns_of(matrix: Matrix, columns: range) -> Matrix:
    """A copy. Of a matrix in blocks they begin and end at multiples of `COLUMNS`; where that is within a block, all
    blocks are halved until it is not, which changes no weight.
    """
    if not isinstance(matrix, PackedBlocks):
        return np.ascontiguousarray(matrix[:, columns.start : columns.stop])
    matrix = in_blocks(matrix, math.gcd(matrix.block_size, columns.start, columns.stop))
    own = slice(columns.start // matrix.block_size, columns.stop // matrix.block_size)
    return replace(
        matrix,
        codes=np.ascontiguousarray(matrix.codes[:, own]),
        scales=np.ascontiguousarray(matrix.scales[:, own]),
        offsets=None if matrix.offsets is None else np.ascontiguousarray(matrix.offsets[:, own]),
    )


def in_blocks(matrix: PackedBlocks, size: int) -> PackedBlocks:
    """The same weights in smaller blocks."""
    assert size >= COLUMNS, f"kernels have no blocks of {size} weights"
    assert matrix.block_size % size == 0
    more = matrix.block_size // size
    if more == 1:
        return matrix
    rows, blocks, byte_count = matrix.codes.shape
    return replace(
        matrix,
        block_size=size,
        codes=matrix.codes.reshape(rows, blocks * more, byte_count // more),
        scales=np.repeat(matrix.scales, more, axis=1),
        offsets=None if matrix.offsets is None else np.repeat(matrix.offsets, more, axis=1),
    )


def in_all(ranges: Sequence[range], matrix_rows: int, matrix_count: int) -> list[range]:
    """The same ranges of rows of each of several matrices that lie below one another."""
    starts = range(0, matrix_rows * matrix_count, matrix_rows)
    return [range(start + each.start, start + each.stop) for start in starts for each in ranges]


def _taken(array: NDArray[Any], ranges: Sequence[range]) -> NDArray[Any]:
    parts = [array[each.start : each.stop] for each in ranges]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
