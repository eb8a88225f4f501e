"""Making weights small on the way in: the codes of GGUF's formats, and an error that is measured."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from covey.checkpoints.blocks import values_of
from covey.checkpoints.quantizing import error_of, quantize, rounded

WEIGHTS = np.random.default_rng(8).standard_normal((16, 256)).astype(np.float32)


@pytest.mark.parametrize(("bits", "name", "most"), [(4, "Q4_0", 0.09), (8, "Q8_0", 0.006)])
def test_it_is_as_near_as_the_format_of_the_same_kind(bits, name, most):
    kind = gguf.GGMLQuantizationType[name]
    theirs = gguf.quants.dequantize(gguf.quants.quantize(WEIGHTS, kind), kind)
    their_error = np.sqrt(np.mean((theirs - WEIGHTS) ** 2) / np.mean(WEIGHTS**2))
    ours = error_of(WEIGHTS, bits)
    assert 0.9 * their_error < ours < 1.01 * their_error
    assert ours < most


def test_what_is_packed_is_what_was_measured():
    for bits in (4, 8):
        packed, blocks = quantize(WEIGHTS, bits), rounded(WEIGHTS, bits)
        assert (packed.bits, packed.block_size, packed.offsets) == (bits, 32, None)
        assert packed.codes.nbytes == WEIGHTS.size * bits // 8
        codes = packed.codes
        if bits == 4:
            codes = np.stack((codes & 15, codes >> 4), axis=-1).reshape(*codes.shape[:-1], -1)
        weights = packed.scales[..., np.newaxis] * (codes.astype(np.float32) - 2 ** (bits - 1))
        assert np.array_equal(weights, values_of(blocks))


def test_nothing_is_lost_of_nothing_and_of_what_fits():
    assert error_of(np.zeros((2, 32), np.float32), 4) == 0
    fits = (np.arange(64, dtype=np.float32).reshape(2, 32) % 16) - 8
    assert error_of(fits, 4) == 0


@settings(max_examples=100, deadline=None)
@given(arrays(np.float32, (2, 64), elements=st.floats(-1e6, 1e6, width=32)), st.sampled_from([4, 8]))
def test_no_weight_is_off_by_more_than_a_step(weights, bits):
    blocks = rounded(weights, bits)
    off = np.abs(values_of(blocks).reshape(2, 2, 32).astype(np.float64) - weights.reshape(2, 2, 32))
    step = np.abs(blocks.scales)[..., np.newaxis].astype(np.float64)
    lost = 8 * np.finfo(np.float32).tiny  # a scale that is smaller than normal numbers is not precise, or 0
    assert (off <= step * (1 + 1e-5) + lost).all()  # at the end opposite to the largest weight a whole one, else half
