"""Matrices in the layout of this machine's kernels, in a file in memory that ONNX Runtime maps.

ONNX Runtime can save a model with its weights packed, and maps them when it loads that again. Here each matrix is
packed so by itself, and written behind those before: no more than one is held more than once while a model is loaded.

It also carries the offsets of blocks for nothing. A packed matrix has a float for each block, which the sum of that
block's activations is multiplied by: `-scale * zero`. The operator takes whole zeros only; the kernel takes any float,
so the offset is added there. Where that float lies is not documented, so nothing is taken on trust: a matrix whose
floats are not what they must be is refused, and before the first one a trial is computed
(docs/decisions/0010-kernel-file.md).
"""

import ctypes
import fcntl
import functools
import logging
import mmap
import os
import secrets
import sys
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import onnx
from msgspec.structs import replace
from numpy.typing import NDArray

from covey.checkpoints.blocks import FLOAT_BYTES, HALF_BYTE, Bytes, PackedBlocks, paired
from covey.engine.onnx.builder import INT8_ACCUMULATION, KEPT, GraphBuilder, Kept
from covey.engine.onnx.runtime import FILE_FOLDER, new_options, open_session

FOLDER: Final = Path("/dev/shm")  # noqa: S108 - memory, on Linux; files have no name there but for a moment
PREFIX: Final = "covey-kernels-"
ALIGNMENT: Final = 64  # bytes; a kernel's layout depends on where it begins
LANES: Final = 16  # rows whose floats lie side by side
POPULATE_READ: Final = 22  # MADV_POPULATE_READ, of Linux 5.14 and newer; before, pages count later
BLANK_AT: Final = 1 << 40  # far behind all matrices: a hole of zeros
ROOM_TIMES: Final = 3  # of what a stage has in its file, of which it takes up to twice as much
TRIAL: Final = (40, 3, 32)  # rows, blocks, weights of a block

log = logging.getLogger(__name__)


class KernelFile:
    """Grows matrix by matrix. Sessions that were opened while it was `named` keep what they need of it."""

    def __init__(self) -> None:
        """Raises `OSError` where there is no such memory."""
        _remove_leftovers()
        self.name = f"{PREFIX}{secrets.token_hex(8)}"
        self._file = os.open(FOLDER, os.O_TMPFILE | os.O_RDWR, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._end = 0
        self._count = 0
        self._blank_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def add(self, matrix: PackedBlocks) -> Kept | None:
        """None where the layout is not the one that is known, or there is no room."""
        try:
            return self._add(matrix)
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors have no class of their own in common
            log.warning("a matrix is left to the session to pack: %s", error)
            return None

    def _add(self, matrix: PackedBlocks) -> Kept | None:
        blank = _blank(matrix, self._count + 1)
        with ThreadPoolExecutor(1) as other:  # which computes at the same time
            mark = other.submit(lambda: _packed(blank)[0])
            content = _packed(matrix)[1]
        if not _carry_offsets(content, matrix) or not self._has_room(len(content)):
            return None
        kept = Kept(self.name, BLANK_AT, f"{mark.result()}|{self._end};{len(content)};0", blank.scales)
        self._write(content)
        self._count += 1
        self._blank_bytes = max(self._blank_bytes, blank.codes.nbytes)
        return kept

    @contextmanager
    def named(self) -> Generator[str]:
        """The folder that sessions find it in meanwhile."""
        os.ftruncate(self._file, BLANK_AT + self._blank_bytes)
        path = FOLDER / self.name
        os.link(f"/proc/self/fd/{self._file}", path, src_dir_fd=self._file, follow_symlinks=True)
        try:
            yield str(FOLDER)
            self._make_resident()
        finally:
            path.unlink()
            os.ftruncate(self._file, self._end)  # zeros that were read took memory

    def _make_resident(self) -> None:
        """Pages count as this process's when they are first read. They are taken from what is free already, and who
        compares the two would count them twice.
        """
        library = ctypes.CDLL(None, use_errno=True)
        for line in Path("/proc/self/maps").read_text().splitlines():
            if self.name in line:
                start, end = (int(each, 16) for each in line.split()[0].split("-"))
                library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), POPULATE_READ)

    def _has_room(self, byte_count: int) -> bool:
        found = os.fstatvfs(self._file)
        return found.f_bavail * found.f_frsize >= byte_count

    def _write(self, content: Bytes) -> None:
        view: Any = content.data
        written = 0
        while written < len(content):
            written += os.pwrite(self._file, view[written:], self._end + written)
        self._end += -(-len(content) // ALIGNMENT) * ALIGNMENT


@contextmanager
def opened() -> Generator[KernelFile | None]:
    """None where sessions have to pack for themselves."""
    try:
        file = KernelFile() if is_usable() else None
    except OSError as error:
        log.warning("weights are packed by the sessions themselves: %s", error)
        file = None
    with file or nullcontext() as found:
        yield found


def has_room(byte_count: int) -> bool:
    """Whether a stage that takes so many bytes of a model file has clearly room there, though others load, too."""
    found = os.statvfs(FOLDER)
    return found.f_bavail * found.f_frsize > ROOM_TIMES * byte_count


@functools.cache
def is_usable() -> bool:
    """Whether a file on this machine, with this version of ONNX Runtime, makes products come out right."""
    if sys.platform != "linux":
        return False
    try:
        return all(_is_right(bits) for bits in (4, 8))
    except Exception as error:  # noqa: BLE001 - likewise: whatever it is, sessions can do without
        log.warning("weights are packed by the sessions themselves: %s", error)
        return False


def _remove_leftovers() -> None:
    """Names that processes which were killed had given to their files. Who still uses one holds a lock on it."""
    for left in FOLDER.glob(f"{PREFIX}*"):
        try:
            if left.lstat().st_uid == os.getuid() and left.is_file() and not left.is_symlink():
                with left.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    left.unlink()
        except OSError as error:  # in use, another user's, or gone meanwhile
            log.debug("%s is left: %s", left, error)


# ---- packing one matrix ----


def _blank(matrix: PackedBlocks, number: int) -> PackedBlocks:
    """What the session is given in its stead. It packs that, and looks for something packed under the mark of the
    result: so no two may be alike. Of pages that are only read, no memory is taken.
    """
    pages = mmap.mmap(-1, matrix.scales.nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    scales = np.frombuffer(pages, np.float32).reshape(matrix.scales.shape)
    scales[0, 0] = number
    return replace(matrix, codes=np.zeros_like(matrix.codes), scales=scales, offsets=None)


def _packed(matrix: PackedBlocks) -> tuple[str, Bytes]:
    """ONNX Runtime's mark of the packed matrix, and that itself."""
    model, weights = os.memfd_create("model"), os.memfd_create("weights")
    try:
        options = new_options(1)
        options.optimized_model_filepath = f"/proc/self/fd/{model}"
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", str(weights))
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "0")
        options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
        builder = _product(matrix)
        open_session(builder.model(), options, builder.weights)
        saved = onnx.ModelProto.FromString(os.pread(model, os.fstat(model).st_size, 0))
        mark, start, size = _entry(saved)
        mapped: Bytes = np.frombuffer(mmap.mmap(weights, 0), np.uint8)  # keeps the memory though the file is closed
        return mark, mapped[start : start + size]
    finally:
        os.close(model)
        os.close(weights)


def _product(matrix: PackedBlocks, kept: Kept | None = None) -> GraphBuilder:
    """The product with it, and nothing else."""
    builder = GraphBuilder()
    rows, blocks = matrix.scales.shape
    source = builder.input("source", np.float32, ["tokens", blocks * matrix.block_size])
    codes = builder.constant("codes", matrix.codes) if kept is None else builder.kept("codes", matrix.codes.shape, kept)
    scales = builder.constant("scales", (matrix if kept is None else kept).scales.reshape(-1))
    builder.matmul_blocks([source, codes, scales], "product", matrix, INT8_ACCUMULATION)
    builder.output("product", np.float32, ["tokens", rows])
    return builder


def _entry(saved: onnx.ModelProto) -> tuple[str, int, int]:
    """Where the packed codes are. Raises `RuntimeError` where there are none."""
    found = [entry.value for each in saved.graph.initializer for entry in each.external_data if entry.key == KEPT]
    if len(found) != 1:
        raise RuntimeError(f"ONNX Runtime saved {len(found)} packed matrices, not one")
    mark, place = found[0].split("|")
    start, size, _ = place.split(";")
    return mark, int(start), int(size)


def _carry_offsets(content: Bytes, matrix: PackedBlocks) -> bool:
    """Adds the offsets to the floats that block sums are multiplied by. False where those are not what they must be."""
    rows, blocks = matrix.scales.shape
    count = -(-rows // LANES) * LANES * blocks
    start = -(-matrix.codes.nbytes // ALIGNMENT) * ALIGNMENT
    end = start + count * FLOAT_BYTES
    if end > len(content):
        return False
    floats: Any = content[start:end].view(np.float32).reshape(-1, blocks, LANES)
    zeros: Any = np.float32(-(1 << (matrix.bits - 1))) * matrix.scales
    whole = rows // LANES
    parts = [(floats[:whole], slice(0, whole * LANES)), (floats[whole:, :, : rows % LANES], slice(whole * LANES, rows))]
    laid = [(part.transpose(0, 2, 1), (-1, part.shape[2], blocks), at) for part, at in parts if part.size]
    if not all(np.array_equal(part, zeros[at].reshape(shape)) for part, shape, at in laid):
        return False
    if matrix.offsets is not None:
        for part, shape, at in laid:
            np.add(part, matrix.offsets[at].reshape(shape), out=part)
    return True


# ---- whether it works ----


def _is_right(bits: int) -> bool:
    """One product, with one token and with several, against plain arithmetic."""
    matrix, weights = _trial(bits)
    tokens = np.random.default_rng(bits).standard_normal((5, weights.shape[1])).astype(np.float32)
    with KernelFile() as file:
        kept = file.add(matrix)
        if kept is None:
            return False
        builder, options = _product(matrix, kept), new_options(1)
        with file.named() as folder:
            options.add_session_config_entry(FILE_FOLDER, folder)
            session = open_session(builder.model(), options, builder.weights)
    return all(_is_near(session.run(None, {"source": some})[0], some @ weights.T) for some in (tokens[:1], tokens))


def _trial(bits: int) -> tuple[PackedBlocks, NDArray[np.float32]]:
    """A matrix of 40 rows and 96 columns with an offset in each block, and its weights."""
    rows, blocks, size = TRIAL
    random = np.random.default_rng(bits)
    codes = random.integers(0, 1 << bits, TRIAL, np.uint8)
    scales, offsets = (random.standard_normal((rows, blocks)).astype(np.float32) for _ in range(2))
    centred: Any = codes.astype(np.float32) - (1 << (bits - 1))
    weights = scales[..., np.newaxis] * centred + 8 * offsets[..., np.newaxis]
    held = paired(codes) if bits == HALF_BYTE else codes
    return PackedBlocks(bits, size, held, scales, 8 * offsets), weights.reshape(rows, -1)


def _is_near(result: NDArray[np.float32], expected: NDArray[np.float32]) -> bool:
    """As near as 8 bits of activations let it be."""
    return bool(np.abs(result - expected).max() < np.abs(expected).max() / 20)
