"""Model files come from strangers, half-finished downloads and dying disks; the header reader meets them first."""

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from covey.checkpoints import gguf_file
from covey.checkpoints.checkpoint import CheckpointError, read_tensor
from covey.checkpoints.gguf_file import (
    TENSOR_TYPES,
    HeaderIncompleteError,
    parse_header,
    read_header,
)
from covey.checkpoints.quantization import is_known


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "sample.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_int64("a.negative", -5)
    writer.add_float32("a.float", 0.25)
    writer.add_bool("a.flag", val=True)
    writer.add_string("a.text", "grüße")
    writer.add_array("a.texts", ["one", "two", "drei"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.flags", [True, False])
    generator = np.random.default_rng(7)
    writer.add_tensor("plain", generator.standard_normal((3, 5), np.float32))
    weights = generator.standard_normal((4, 64), np.float32)
    packed = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_it_reads_what_the_reference_writer_wrote(sample):
    header = read_header(sample)
    assert header.file_bytes == sample.stat().st_size
    expected = {
        "general.architecture": "llama",
        "llama.block_count": 3,
        "a.negative": -5,
        "a.float": 0.25,
        "a.flag": True,
        "a.text": "grüße",
        "a.texts": ["one", "two", "drei"],
        "a.numbers": [1, 2, 3],
        "a.flags": [True, False],
    }
    assert {key: header.metadata[key] for key in expected} == expected
    assert header.metadata["a.flags"][0] is True


def test_tensors_are_where_the_reference_reader_finds_them(sample):
    header = read_header(sample)
    reference = gguf.GGUFReader(sample)
    assert [tensor.name for tensor in reference.tensors] == list(header.tensors)
    with sample.open("rb", buffering=0) as file:
        for tensor in reference.tensors:
            entry = header.tensors[tensor.name]
            assert entry.offset == tensor.data_offset
            assert entry.byte_count == tensor.n_bytes
            assert entry.shape == tuple(int(size) for size in reversed(tensor.shape))
            assert read_tensor(file, entry).tobytes() == tensor.data.tobytes()


def test_the_table_of_types_is_the_reference_s():
    for kind, (name, elements, size) in TENSOR_TYPES.items():
        reference = gguf.GGMLQuantizationType(kind)
        assert reference.name == name
        assert gguf.GGML_QUANT_SIZES[reference] == (elements, size)


def test_a_hub_client_is_told_to_fetch_more(sample):
    content = sample.read_bytes()
    header_end = min(entry.offset for entry in read_header(sample).tensors.values())
    fetched = 0
    while True:
        try:
            header = parse_header(content[:fetched], len(content))
            break
        except HeaderIncompleteError as incomplete:
            wanted = incomplete.bytes_needed
        assert fetched < wanted <= header_end
        fetched = wanted
    assert header == read_header(sample)


def test_a_file_cut_anywhere_is_refused(sample, tmp_path):
    content = sample.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 600, 7), *range(600, len(content) - 32, 13), len(content) - 64]:
        cut.write_bytes(content[:length])
        with pytest.raises(CheckpointError) as refusal:
            read_header(cut)
        assert not isinstance(refusal.value, HeaderIncompleteError)


def test_a_long_header_is_read_and_walked_through_once(tmp_path, monkeypatch):
    """Those of large vocabularies have many megabytes: a second for each walk, and other readers wait for the disk."""
    words = [b"word %d" % number for number in range(40_000)]
    texts = b"".join(struct.pack("<Q", len(word)) + word for word in words)
    path = tmp_path / "long.gguf"
    path.write_bytes(
        preamble(entries=2)
        + text_value(b"words", 9, struct.pack("<IQ", 8, len(words)) + texts)
        + text_value(b"numbers", 9, struct.pack("<IQ", 4, 20_000) + bytes(80_000))
        + bytes(1_000_000)
    )
    reads, walks = [], []
    real_read, real_version = gguf_file._read_on, gguf_file._expect_version
    monkeypatch.setattr(gguf_file, "READ_BYTES", 1000)
    monkeypatch.setattr(gguf_file, "_read_on", lambda file, count: reads.append(real_read(file, count)) or reads[-1])
    monkeypatch.setattr(gguf_file, "_expect_version", lambda cursor: walks.append(1) or real_version(cursor))
    header = read_header(path)
    assert header.metadata["words"] == [word.decode() for word in words]
    assert header.metadata["numbers"] == [0] * 20_000
    assert len(walks) == 1
    assert sum(len(read) for read in reads) <= path.stat().st_size - 1_000_000 + 1000
    assert max(len(read) for read in reads) <= 80_000


def test_a_header_may_be_cut_into_windows_anywhere(sample, monkeypatch):
    whole = read_header(sample)
    for read_bytes in (1, 7, 64):
        monkeypatch.setattr(gguf_file, "READ_BYTES", read_bytes)
        assert read_header(sample) == whole


def test_a_cut_within_the_tensors_names_both_sizes(sample, tmp_path):
    content = sample.read_bytes()
    last = list(read_header(sample).tensors.values())[-1]
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(content[: last.offset + 10])
    needed, found = last.offset + last.byte_count, last.offset + 10
    with pytest.raises(CheckpointError, match=rf"need {needed} bytes but the file has {found}"):
        read_header(cut)


def test_flipped_bits_end_in_a_refusal_or_a_header_never_in_a_crash(sample):
    content = sample.read_bytes()
    header_end = min(entry.offset for entry in read_header(sample).tensors.values())
    chance = random.Random(5)
    refused = 0
    for _ in range(4000):
        damaged = bytearray(content)
        for _ in range(chance.choice((1, 1, 2, 8))):
            damaged[chance.randrange(header_end)] = chance.randrange(256)
        try:
            parse_header(bytes(damaged), len(damaged))
        except HeaderIncompleteError:
            pytest.fail("all of the file is there; there is nothing to wait for")
        except CheckpointError:
            refused += 1
    assert refused > 1000


def preamble(*, version: int = 3, tensors: int = 0, entries: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


def tensor(name: bytes, dimensions: tuple[int, ...], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<{len(dimensions)}Q", *dimensions)
    return (
        struct.pack("<Q", len(name))
        + name
        + struct.pack("<I", len(dimensions))
        + sizes
        + struct.pack("<IQ", kind, offset)
    )


def text_value(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04 a zip archive", "not a GGUF file"),
        (b"", "not a GGUF file"),
        (preamble(version=1), "version 1; versions 2 and 3"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(64), "big-endian"),
        (preamble(tensors=1 << 60), "announces 1152921504606846976 entries"),
        (preamble(entries=1 << 40) + bytes(64), "announces 1099511627776 entries"),
        (preamble(entries=1) + text_value(b"key", 9, struct.pack("<IQ", 8, 1 << 50)), "announces"),
        (preamble(entries=1) + text_value(b"key", 9, struct.pack("<IQ", 4, 1 << 50)), "beyond the end"),
        (preamble(entries=1) + text_value(b"key", 99, bytes(8)), "unknown type 99"),
        (preamble(entries=1) + text_value(b"key", 8, struct.pack("<Q", 1 << 62)), "beyond the end"),
        (preamble(entries=1) + text_value(b"k", 9, struct.pack("<IQ", 9, 1) * 9) + bytes(64), "nested too deep"),
        (preamble(entries=2) + 2 * text_value(b"key", 0, b"1"), "'key' is in its header twice"),
        (
            preamble(tensors=1) + tensor(b"t", (32,), 77, 0) + bytes(999),
            "'t' is of type number 77, which is not known; Covey runs F32, F16, BF16, Q4_0",
        ),
        (preamble(tensors=1) + tensor(b"t", (33,), 2, 0) + bytes(999), "'t' of Q4_0 measures"),
        (preamble(tensors=1) + tensor(b"t", (0,), 0, 0) + bytes(999), "'t' of F32 measures"),
        (preamble(tensors=1) + tensor(b"t", (8,), 0, 3) + bytes(999), "multiple of 32"),
        (preamble(tensors=1) + tensor(b"t", (1,) * 5, 0, 0) + bytes(999), "has 5 dimensions"),
        (preamble(tensors=1) + tensor(b"t", (1 << 62, 1 << 62), 0, 0) + bytes(999), "is cut off"),
        (
            preamble(tensors=2) + tensor(b"t", (64,), 0, 0) + tensor(b"u", (8,), 0, 64) + bytes(999),
            "'t' and 'u' overlap",
        ),
    ],
)
def test_what_is_wrong_is_said(content, message, tmp_path):
    path = tmp_path / "wrong.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_header(path)
    assert str(path) in str(refusal.value)


def test_a_file_that_shrinks_while_a_tensor_is_read(sample, tmp_path):
    entry = read_header(sample).tensors["packed"]
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(sample.read_bytes()[: entry.offset + 5])
    with cut.open("rb", buffering=0) as file, pytest.raises(CheckpointError, match="ends within its tensor 'packed'"):
        read_tensor(file, entry)


def test_the_types_that_are_told_of_are_those_that_run(tmp_path):
    path = tmp_path / "wrong.gguf"
    path.write_bytes(preamble(tensors=1) + tensor(b"t", (32,), 77, 0) + bytes(999))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    told = str(caught.value).partition("Covey runs ")[2].split(", ")
    assert set(told) == {name for name, _, _ in TENSOR_TYPES.values() if is_known(name)}
