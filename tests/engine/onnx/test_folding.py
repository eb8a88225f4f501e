"""Offsets of blocks that became further blocks of a matrix: what they mean, and when they may not."""

import gguf
import numpy as np
import pytest
from msgspec.structs import replace

from covey.checkpoints.blocks import PackedBlocks
from covey.checkpoints.checkpoint import TensorEntry
from covey.checkpoints.quantization import pack
from covey.engine.onnx.folding import CENTRE, DIGITS, Folded, filling, fold


def random_blocks(rows: int, blocks: int, size: int, seed: int = 1) -> PackedBlocks:
    """As quantisers make them: of each block the least weight is code 0, the largest 15."""
    random = np.random.default_rng(seed)
    weights = random.standard_normal((rows, blocks, size)).astype(np.float32)
    least, most = weights.min(-1), weights.max(-1)
    scales = (most - least) / np.float32(15)
    codes = np.rint((weights - least[..., None]) / scales[..., None]).astype(np.uint8)
    return PackedBlocks(4, size, codes[..., 0::2] | codes[..., 1::2] << 4, scales, least + 8 * scales)


def unpacked(pairs: np.ndarray) -> np.ndarray:
    return np.stack((pairs & 15, pairs >> 4), axis=-1).reshape(*pairs.shape[:-1], -1).astype(np.float64)


def product(matrix: PackedBlocks, values: np.ndarray) -> np.ndarray:
    assert matrix.offsets is not None
    weights = matrix.scales[..., None] * (unpacked(matrix.codes) - CENTRE) + matrix.offsets[..., None]
    return weights.reshape(len(weights), -1) @ values


def folded_product(matrix: PackedBlocks, folded: Folded, values: np.ndarray) -> np.ndarray:
    """What the operator computes, in float64, of the activations that `Folded` names."""
    blocks = folded.scales.shape[1]
    zeros = unpacked(folded.zeros)[:, :blocks]
    weights = folded.scales[..., None] * (unpacked(folded.codes) - zeros[..., None])
    sums = np.pad(values.reshape(-1, matrix.block_size).sum(-1), (0, filling(matrix)))
    return weights.reshape(len(weights), -1) @ np.concatenate([values, *[sums] * DIGITS])


@pytest.mark.parametrize(("blocks", "size"), [(1, 32), (18, 32), (32, 32), (33, 32), (5, 16), (2, 128)])
def test_it_means_the_same(blocks: int, size: int) -> None:
    matrix = random_blocks(8, blocks, size)
    folded = fold(matrix)
    assert folded is not None
    values = np.random.default_rng(2).standard_normal(blocks * size)
    exact = product(matrix, values)
    off = folded_product(matrix, folded, values) - exact
    sums = np.abs(values.reshape(blocks, size).sum(-1)).sum()
    assert np.abs(off).max() <= matrix.scales.max() * sums / 400
    assert np.abs(off).max() < 0.01 * np.abs(exact).max()


def test_it_means_the_same_in_the_formats_of_files() -> None:
    weights = np.random.default_rng(3).standard_normal((4, 512)).astype(np.float32)
    content = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q4_1)
    entry = TensorEntry("w", "Q4_1", (4, 512), 0, content.nbytes)
    matrix = pack(entry, content.reshape(-1).view(np.uint8))
    folded = fold(matrix)
    assert folded is not None
    values = np.random.default_rng(4).standard_normal(512)
    theirs = gguf.quants.dequantize(content, gguf.GGMLQuantizationType.Q4_1).astype(np.float64) @ values
    assert np.abs(folded_product(matrix, folded, values) - theirs).max() < 0.005 * np.abs(theirs).max()


def test_blocks_of_one_value_lose_nothing() -> None:
    """Their scale is 0, and all that they are is an offset."""
    matrix = random_blocks(16, 8, 32)
    scales, offsets = matrix.scales.copy(), np.array(matrix.offsets)
    scales[:, 1], offsets[:, 1] = 0, 0.1 * matrix.scales.min()
    matrix = replace(matrix, scales=scales, offsets=offsets)
    folded = fold(matrix)
    assert folded is not None
    values = np.random.default_rng(5).standard_normal(256)
    assert np.abs(folded_product(matrix, folded, values) - product(matrix, values)).max() < 0.05


def test_what_would_lose_something_stays_as_it_is() -> None:
    matrix = random_blocks(2, 4, 32)
    assert matrix.offsets is not None
    assert fold(replace(matrix, offsets=matrix.offsets + 100 * matrix.scales.max())) is None  # far from all codes
    few = matrix.offsets.copy()
    few[:, 0] += 16 * matrix.scales[:, 0]
    assert fold(replace(matrix, offsets=few)) is None
    assert fold(replace(matrix, offsets=None)) is None
    assert fold(replace(matrix, bits=8)) is None
