"""Matrices packed into a file, against plain arithmetic, and what becomes of the file."""

import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from covey.checkpoints.blocks import Bytes, PackedBlocks, paired
from covey.engine.onnx import kernel_file
from covey.engine.onnx.builder import INT8_ACCUMULATION, GraphBuilder
from covey.engine.onnx.kernel_file import FOLDER, KernelFile
from covey.engine.onnx.runtime import FILE_FOLDER, new_options, open_session

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="elsewhere sessions pack for themselves"
)
Floats = NDArray[np.float32]


def make_matrix(rows: int, blocks: int, size: int, bits: int, *, has_offsets: bool = True, seed: int = 0) -> Any:
    """A matrix, and its weights in float64."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 1 << bits, (rows, blocks, size), np.uint8)
    scales = random.standard_normal((rows, blocks)).astype(np.float32)
    offsets = 10 * random.standard_normal((rows, blocks)).astype(np.float32) if has_offsets else None
    weights = scales[..., None] * (codes.astype(np.float64) - (1 << (bits - 1)))
    if offsets is not None:
        weights += offsets[..., None]
    return PackedBlocks(bits, size, paired(codes) if bits == 4 else codes, scales, offsets), weights.reshape(rows, -1)


def products(matrices: list[PackedBlocks], tokens: Floats) -> list[Floats]:
    """Of one session that has all of them, after the file is closed."""
    builder = GraphBuilder()
    source = builder.input("source", np.float32, ["tokens", tokens.shape[1]])
    with KernelFile() as file:
        for index, matrix in enumerate(matrices):
            kept = file.add(matrix)
            assert kept is not None
            codes = builder.kept(f"codes.{index}", matrix.codes.shape, kept)
            scales = builder.constant(f"scales.{index}", kept.scales.reshape(-1))
            builder.matmul_blocks([source, codes, scales], f"product.{index}", matrix, INT8_ACCUMULATION)
            builder.output(f"product.{index}", np.float32, ["tokens", len(matrix.scales)])
        options = new_options(1)
        with file.named() as folder:
            options.add_session_config_entry(FILE_FOLDER, folder)
            session = open_session(builder.model(), options, builder.weights)
    return session.run(None, {"source": tokens})


def whole_tokens(count: int, columns: int) -> Floats:
    """Activations that 8 bits hold exactly, so that nothing is rounded but sums."""
    tokens = np.random.default_rng(1).integers(-127, 128, (count, columns)).astype(np.float32)
    tokens[:, ::16] = 127  # the largest of each block: its scale is 1
    return tokens


def test_it_is_used_here() -> None:
    assert kernel_file.is_usable()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("rows", "blocks", "size"), [(16, 1, 32), (49, 18, 32), (64, 20, 32), (40, 5, 64), (33, 7, 16)]
)
@pytest.mark.parametrize("count", [1, 5])
def test_products_with_offsets(bits: int, rows: int, blocks: int, size: int, count: int) -> None:
    matrix, weights = make_matrix(rows, blocks, size, bits)
    tokens = whole_tokens(count, blocks * size)
    (result,) = products([matrix], tokens)
    expected = tokens.astype(np.float64) @ weights.T
    assert np.abs(result - expected).max() < 1e-5 * np.abs(expected).max()


def test_matrices_that_look_alike_are_not_mistaken_for_one_another() -> None:
    made = [make_matrix(32, 4, 32, 4, has_offsets=False, seed=seed) for seed in range(6)]
    tokens = whole_tokens(3, 128)
    for result, (_, weights) in zip(products([matrix for matrix, _ in made], tokens), made, strict=True):
        assert np.allclose(result, tokens @ weights.T, rtol=1e-4, atol=1e-2)


def test_a_layout_that_is_not_the_known_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = kernel_file._packed  # pyright: ignore[reportPrivateUsage]

    def moved(matrix: PackedBlocks) -> tuple[str, Bytes]:
        mark, content = packed(matrix)
        return mark, np.roll(content, 4)

    monkeypatch.setattr(kernel_file, "_packed", moved)
    with KernelFile() as file:
        assert file.add(make_matrix(40, 3, 32, 4)[0]) is None


def test_where_there_is_no_room_the_session_packs_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def nearly_full(_: int) -> SimpleNamespace:
        return SimpleNamespace(f_bavail=1, f_frsize=512)

    monkeypatch.setattr(os, "fstatvfs", nearly_full)
    with KernelFile() as file:
        assert file.add(make_matrix(40, 3, 32, 4)[0]) is None


def test_a_disk_that_fails_meanwhile_leaves_the_matrix_to_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    matrix, _ = make_matrix(40, 3, 32, 4)
    with KernelFile() as file:
        with monkeypatch.context() as broken:
            broken.setattr(os, "pwrite", full)
            assert file.add(matrix) is None
        assert file.add(matrix) is not None


def test_elsewhere_it_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not kernel_file.is_usable.__wrapped__()


@pytest.fixture
def leftover() -> Iterator[Path]:
    path = FOLDER / f"{kernel_file.PREFIX}test-{os.getpid()}"
    path.write_bytes(b"")
    yield path
    path.unlink(missing_ok=True)


def test_a_name_that_a_killed_process_left_is_removed(leftover: Path) -> None:
    with KernelFile():
        assert not leftover.exists()


def test_a_name_in_use_is_left_alone_and_gone_after_it() -> None:
    with KernelFile() as first, first.named() as folder:
        path = Path(folder) / first.name
        with KernelFile():
            assert path.exists()
    assert not path.exists()
