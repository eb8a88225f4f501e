"""Quantised folders: MLX's codes against MLX itself, the others against their description, written out plainly."""

from pathlib import Path

import numpy as np
import pytest

from covey.checkpoints.blocks import KERNEL_BYTES, PackedBlocks
from covey.checkpoints.checkpoint import CheckpointError, TensorEntry
from covey.checkpoints.hub_quantization import Quantization, quantised_entry
from covey.checkpoints.quantization import dequantize, form_of, held_bytes, pack

GOLDEN = np.load(Path(__file__).parent / "golden" / "mlx.npz")
NAMES = {"float32": "F32", "float16": "F16", "uint32": "U32", "int32": "I32", "uint8": "U8"}


def entry_of(quantization: Quantization, **parts: np.ndarray) -> tuple[TensorEntry, np.ndarray]:
    entries = {
        kind: TensorEntry(f"it.{kind}", NAMES[part.dtype.name], part.shape, 0, part.nbytes)
        for kind, part in parts.items()
    }
    entry = quantised_entry("it", entries, quantization)
    content = [np.ascontiguousarray(parts[part.name.removeprefix("it.")]).view(np.uint8) for part in entry.parts]
    return entry, np.concatenate([each.reshape(-1) for each in content])


def unpacked(packed: PackedBlocks) -> np.ndarray:
    """What the kernels make of it, in float64."""
    codes = packed.codes
    if packed.bits == 4:
        codes = np.stack((codes & 15, codes >> 4), axis=-1).reshape(*codes.shape[:-1], -1)
    weights = packed.scales[..., np.newaxis] * (codes.astype(np.float64) - 2 ** (packed.bits - 1))
    offsets = 0 if packed.offsets is None else packed.offsets[..., np.newaxis]
    return (weights + offsets).reshape(weights.shape[0], -1)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_what_mlx_quantised_is_what_mlx_says_it_is(bits, group):
    words, scales, biases, values = (
        GOLDEN[f"{bits}.{group}.{name}"] for name in ("words", "scales", "biases", "values")
    )
    entry, content = entry_of(Quantization("mlx", bits, group), weight=words, scales=scales, biases=biases)
    assert entry.type == f"MLX_{bits}"
    assert entry.shape == values.shape
    # Both round a product and a sum to float32, one of them perhaps in one step.
    assert np.abs(dequantize(entry, content) - values).max() <= np.abs(values).max() * 2**-22
    packed = pack(entry, content)
    assert packed.bits == (4 if bits <= 4 else 8)
    assert packed.block_size == group
    assert np.abs(unpacked(packed) - values).max() <= np.abs(values).max() * 2**-21


def test_the_two_orders_of_mxfp4_codes():
    words, exponents, values = (GOLDEN[f"mxfp4.{name}"] for name in ("words", "scales", "values"))
    entry, content = entry_of(Quantization("mlx", 4, 32), weight=words, scales=exponents)
    assert np.array_equal(dequantize(entry, content), values)
    assert np.array_equal(unpacked(pack(entry, content)), values)
    blocks = words.view(np.uint8).reshape(*exponents.shape, 16)  # as gpt-oss has them
    entry, content = entry_of(Quantization("mxfp4", 4, 32), blocks=blocks, scales=exponents)
    assert np.array_equal(dequantize(entry, content), values)


COLUMNS, ROWS = 256, 24


def awq_reference(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, group: int) -> np.ndarray:
    """As AutoAWQ's `WQLinear_GEMM` packs: nibble i of word j is that of row `8 * j + order[i]`. [rows, columns]."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    weights = np.zeros((ROWS, COLUMNS))
    for column in range(COLUMNS):
        for row in range(ROWS):
            shift = np.uint32(4 * order.index(row % 8))
            code = (int(qweight.view(np.uint32)[column, row // 8]) >> int(shift)) & 15
            zero = (int(qzeros.view(np.uint32)[column // group, row // 8]) >> int(shift)) & 15
            weights[row, column] = (code - zero) * float(scales[column // group, row])
    return weights


def gptq_reference(
    qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, group: int, stored_less: int
) -> np.ndarray:
    """As AutoGPTQ's `QuantLinear` packs: nibble i of word j is that of column `8 * j + i`; of zeros, that of a row."""
    weights = np.zeros((ROWS, COLUMNS))
    for column in range(COLUMNS):
        for row in range(ROWS):
            code = (int(qweight.view(np.uint32)[column // 8, row]) >> (4 * (column % 8))) & 15
            zero = (int(qzeros.view(np.uint32)[column // group, row // 8]) >> (4 * (row % 8))) & 15
            weights[row, column] = (code - ((zero + stored_less) & 15)) * float(scales[column // group, row])
    return weights


def random_parts(shape: tuple[int, int], group: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(group)
    groups = COLUMNS // group
    return {
        "qweight": generator.integers(-(2**31), 2**31, shape, np.int64).astype(np.int32),
        "qzeros": generator.integers(-(2**31), 2**31, (groups, ROWS // 8), np.int64).astype(np.int32),
        "scales": (0.01 * generator.standard_normal((groups, ROWS))).astype(np.float16),
    }


@pytest.mark.parametrize("group", [32, 128, 256])
def test_awq(group):
    parts = random_parts((COLUMNS, ROWS // 8), group)
    entry, content = entry_of(Quantization("awq", 4, group), **parts)
    assert (entry.type, entry.shape) == ("AWQ_4", (ROWS, COLUMNS))
    expected = awq_reference(**parts, group=group)
    assert np.array_equal(unpacked(pack(entry, content)), expected)
    assert np.array_equal(dequantize(entry, content), expected.astype(np.float32))


@pytest.mark.parametrize(("method", "stored_less"), [("gptq", 1), ("gptq_v2", 0)])
@pytest.mark.parametrize("group", [32, 64, -1])
def test_gptq(group, method, stored_less):
    parts = random_parts((COLUMNS // 8, ROWS), abs(group) if group > 0 else COLUMNS)
    size = group if group > 0 else COLUMNS
    order = (np.arange(COLUMNS) // size).astype(np.int32)
    entry, content = entry_of(Quantization(method, 4, group), **parts, g_idx=order)
    expected = gptq_reference(**parts, group=size, stored_less=stored_less)
    assert np.array_equal(unpacked(pack(entry, content)), expected)
    without = entry_of(Quantization(method, 4, group), **parts)
    assert np.array_equal(unpacked(pack(*without)), expected)


def test_groups_of_odd_sizes_become_several_blocks():
    """A whole row may be a group, and rows of 11,008 are common."""
    generator = np.random.default_rng(1)
    parts = {
        "qweight": generator.integers(0, 2**31, (5504 // 8, 8), np.int32),
        "qzeros": generator.integers(0, 2**31, (1, 1), np.int32),
        "scales": generator.standard_normal((1, 8)).astype(np.float16),
    }
    entry, content = entry_of(Quantization("gptq", 4, -1), **parts)
    packed = pack(entry, content)
    assert (packed.block_size, packed.scales.shape) == (128, (8, 43))
    assert np.array_equal(unpacked(packed).astype(np.float32), dequantize(entry, content))


def test_columns_in_another_order_are_refused():
    parts = random_parts((COLUMNS // 8, ROWS), 64)
    order = np.random.default_rng(2).permutation(np.arange(COLUMNS) // 64).astype(np.int32)
    entry, content = entry_of(Quantization("gptq", 4, 64), **parts, g_idx=order)
    with pytest.raises(CheckpointError, match="reordered the columns"):
        pack(entry, content)


def test_what_is_held_is_what_is_counted():
    for bits in (2, 3, 6):
        parts = {"weight": GOLDEN[f"{bits}.64.words"]} | {
            name: GOLDEN[f"{bits}.64.{name}"] for name in ("scales", "biases")
        }
        entry, content = entry_of(Quantization("mlx", bits, 64), **parts)
        packed, form = pack(entry, content), form_of(entry)
        assert packed.offsets is not None
        assert form is not None
        assert (form.bits, form.block_size, form.has_offsets) == (packed.bits, packed.block_size, True)
        arrays = packed.codes.nbytes + packed.scales.nbytes + packed.offsets.nbytes
        assert held_bytes(entry) == packed.codes.nbytes + KERNEL_BYTES * packed.scales.size
        assert held_bytes(entry, is_multiplied=False) == arrays


@pytest.mark.parametrize(
    ("quantization", "parts", "message"),
    [
        (Quantization("mlx", 7, 64), {"weight": (2, 8), "scales": (2, 1), "biases": (2, 1)}, "7 bits in groups of 64"),
        (Quantization("mlx", 4, 64), {"weight": (2, 9), "scales": (2, 1), "biases": (2, 1)}, "'it.weight' of U32"),
        (Quantization("mlx", 4, 64), {"weight": (2, 8), "scales": (2, 1), "biases": (2, 2)}, "'it.biases'"),
        (Quantization("mlx", 4, 64), {"weight": (2, 8), "scales": (), "biases": ()}, "'it.weight'"),
        (Quantization("mlx", 4, 64), {"qweight": (2, 8), "scales": (2, 1)}, "not those of a matrix quantised by mlx"),
        (Quantization("awq", 4, 64), {"qweight": (128, 1), "qzeros": (1, 1), "scales": (1, 8)}, "1 groups for 128"),
        (Quantization("awq", 4, 64), {"qweight": (64, 2), "qzeros": (1, 1), "scales": (1, 8)}, "'it.qweight' of I32"),
        (Quantization("gptq", 4, 64), {"qweight": (8, 8), "qzeros": (2, 1), "scales": (1, 8)}, "'it.qzeros' of I32"),
        (Quantization("gptq", 4, 64), {"qweight": (), "qzeros": (), "scales": ()}, "the scales of 'it' measure"),
    ],
)
def test_parts_that_do_not_fit(quantization, parts, message):
    types = {"weight": "U32", "qweight": "I32", "qzeros": "I32", "scales": "F16", "biases": "F16"}
    entries = {kind: TensorEntry(f"it.{kind}", types[kind], shape, 0, 0) for kind, shape in parts.items()}
    with pytest.raises(CheckpointError, match=message):
        quantised_entry("it", entries, quantization)
