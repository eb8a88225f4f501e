"""Safetensors come from strangers, too: whatever is wrong with one ends in a sentence."""

import json
from pathlib import Path

import numpy as np
import pytest
from hub_folders import bfloat16, safetensors, with_header
from hypothesis import given, settings
from hypothesis import strategies as st

from covey.checkpoints.checkpoint import CheckpointError, TensorReader
from covey.checkpoints.quantization import dequantize
from covey.checkpoints.safetensors_file import read_safetensors

VALUES = np.random.default_rng(3).standard_normal((6, 5)).astype(np.float32)
SAMPLE = safetensors(
    {"a": VALUES, "b": VALUES.astype(np.float16), "c": bfloat16(VALUES), "empty": VALUES[:0]}, {"x": "y"}
)


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "model.safetensors"


def test_it_reads_what_is_there_and_no_more(file):
    file.write_bytes(SAMPLE)
    tensors, size = read_safetensors(file)
    assert size == len(SAMPLE)
    assert {name: (each.type, each.shape) for name, each in tensors.items()} == {
        "a": ("F32", (6, 5)), "b": ("F16", (6, 5)), "c": ("BF16", (6, 5)), "empty": ("F32", (0, 5)),
    }  # fmt: skip
    expected = {"a": VALUES, "b": VALUES.astype(np.float16).astype(np.float32), "c": bfloat16(VALUES).values}
    with TensorReader(file.parent) as reader:
        for name, values in expected.items():
            assert np.array_equal(dequantize(tensors[name], reader.read(tensors[name])), values)


def test_a_file_cut_anywhere_is_refused(file):
    for length in range(len(SAMPLE)):
        file.write_bytes(SAMPLE[:length])
        with pytest.raises(CheckpointError):
            read_safetensors(file)


def one(dtype: object = "F32", shape: object = (2, 2), offsets: object = (0, 16), **more: object) -> bytes:
    return json.dumps({"t": {"dtype": dtype, "shape": shape, "data_offsets": offsets}, **more}).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"PK\x03\x04 a zip archive", "not a safetensors file"),
        ((1 << 20).to_bytes(8, "little") + bytes(100), "cut off: its header alone has 1048576 bytes"),
        (with_header(b"[1]"), "its header can't be read"),
        (with_header(b"[" * 5000), "its header can't be read"),
        (with_header(b'{"t": {}}'), "its header can't be read"),
        (with_header(b'{"\xff": 1}'), "its header can't be read"),
        (with_header(one(shape=(-1, 2)), bytes(16)), "its header can't be read"),
        (with_header(one(offsets=(0, 16, 3)), bytes(16)), "its header can't be read"),
        (
            with_header(one("F4"), bytes(16)),
            "'t' is of the type 'F4', which is not known; Covey runs F32, F16, BF16 and what",
        ),
        (with_header(one(offsets=(0, 17)), bytes(17)), "takes 16 bytes, but has 17"),
        (with_header(one(offsets=(16, 0)), bytes(16)), "takes 16 bytes, but has -16"),
        (with_header(one(shape=(1 << 40, 1 << 40)), bytes(16)), "bytes, but has 16"),
        (with_header(one(offsets=(16, 32)), bytes(16)), "is cut off: its tensors need"),
        (
            with_header(one(u={"dtype": "U8", "shape": [4], "data_offsets": [12, 16]}), bytes(16)),
            "'t' and 'u' overlap",
        ),
    ],
)
def test_what_is_wrong_is_said(content, message, file):
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_safetensors(file)
    assert str(file) in str(refusal.value)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_flipped_bytes_end_in_a_refusal_or_in_tensors_that_lie_in_the_file(tmp_path_factory, changes):
    damaged = bytearray(SAMPLE)
    for place, value in changes:
        damaged[place] = value
    file = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    file.write_bytes(damaged)
    try:
        tensors, _ = read_safetensors(file)
    except CheckpointError:
        return
    with TensorReader(file.parent) as reader:
        for each in tensors.values():
            assert len(reader.read(each)) == each.byte_count
