"""Every weight has to arrive as the file states it: compared with the `gguf` package, bit for bit."""

import gguf
import numpy as np
import pytest

from covey.checkpoints.checkpoint import CheckpointError, TensorEntry
from covey.checkpoints.quantization import dequantize, known_types, pack

BITS = {
    "Q4_0": 4, "Q4_1": 4, "Q2_K": 4, "Q3_K": 4, "Q4_K": 4,
    "Q5_0": 8, "Q5_1": 8, "Q5_K": 8, "Q6_K": 8, "Q8_0": 8, "IQ4_NL": 8, "IQ4_XS": 8, "MXFP4": 8,
}  # fmt: skip
BLOCKED = tuple(BITS)
ROWS, COLUMNS = 6, 512


def sample(tensor_type: str) -> tuple[TensorEntry, np.ndarray]:
    """Random bytes are a valid tensor of any type, and reach every bit; only scales are kept finite."""
    kind = gguf.GGMLQuantizationType[tensor_type]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(sum(tensor_type.encode()))
    content = generator.integers(0, 256, ROWS * COLUMNS // elements * size, np.uint8)
    blocks = content.reshape(-1, size)
    one = {name: [0] for name in ("Q4_0", "Q5_0", "Q8_0", "F16", "BF16", "IQ4_NL", "IQ4_XS")}
    floats = one | {"Q2_K": [80, 82], "Q3_K": [108], "Q6_K": [208], "F32": [2], "MXFP4": [-1]}
    for start in floats.get(tensor_type, [0, 2]):
        blocks[:, start + 1] &= 0xBF  # no exponent of all ones: neither infinite nor not-a-number
    return TensorEntry("t", tensor_type, (ROWS, COLUMNS), 0, content.size), content


@pytest.mark.parametrize("tensor_type", [*BLOCKED, "F32", "F16", "BF16"])
def test_values_are_the_reference_s_bit_for_bit(tensor_type):
    entry, content = sample(tensor_type)
    kind = gguf.GGMLQuantizationType[tensor_type]
    expected = gguf.quants.dequantize(content.reshape(ROWS, -1), kind).astype(np.float32)
    actual = dequantize(entry, content)
    assert actual.dtype == np.float32
    assert actual.shape == (ROWS, COLUMNS)
    assert np.array_equal(actual.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("tensor_type", BLOCKED)
def test_packing_keeps_every_weight(tensor_type):
    entry, content = sample(tensor_type)
    packed = pack(entry, content)
    codes = packed.codes
    if packed.bits == 4:
        codes = np.stack((codes & 15, codes >> 4), axis=-1).reshape(ROWS, -1, packed.block_size)
    weights = packed.scales[..., np.newaxis] * (codes.astype(np.float64) - 2 ** (packed.bits - 1))
    if packed.offsets is not None:
        weights += packed.offsets[..., np.newaxis]
    largest = np.abs(packed.scales).max() * 16
    expected = dequantize(entry, content)
    if packed.offsets is None:
        assert np.array_equal(weights.reshape(ROWS, COLUMNS), expected)
    else:
        assert np.abs(weights.reshape(ROWS, COLUMNS) - expected).max() <= largest * 2**-22


@pytest.mark.parametrize("tensor_type", BLOCKED)
def test_a_large_tensor_is_packed_piece_by_piece_into_the_same(tensor_type, monkeypatch):
    entry, content = sample(tensor_type)
    whole = pack(entry, content)
    monkeypatch.setattr("covey.checkpoints.quantization.PIECE_WEIGHTS", 4 * COLUMNS)  # pieces of 4 rows and of 2
    pieces = pack(entry, content)
    assert np.array_equal(pieces.codes, whole.codes)
    assert np.array_equal(pieces.scales, whole.scales)
    assert np.array_equal(pieces.offsets, whole.offsets)


def test_files_of_at_most_four_bits_are_held_at_four_unless_their_values_are_a_book_s():
    assert {name: pack(*sample(name)).bits for name in BLOCKED} == BITS


def test_an_unknown_type_is_named_with_what_is_known():
    entry = TensorEntry("blk.0.ffn_up.weight", "IQ2_XS", (1, 256), 0, 74)
    with pytest.raises(CheckpointError, match=r"'blk.0.ffn_up.weight' has the type IQ2_XS.*Q4_1") as refusal:
        dequantize(entry, np.zeros(74, np.uint8))
    for name in known_types():
        assert name in str(refusal.value)
