"""What packing does to memory: of sessions that multiply by the same matrices, by who packs these.

    python bench/packing.py [--matrices 12] [--bits 4]

Random matrices of 2,048 columns and 8,192 rows in blocks of 32. Each way has a process of its own, in which one session
is made and run, and then a second one of the same graph, as there would be for prompts and for answers. Told are the
most that was resident while the first was made, and what is held with one and with two, over what codes and scales take
by themselves, without what the program held before (Linux; pages that sessions share count once).
"""

import argparse
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from covey.checkpoints.blocks import FLOAT_BYTES, PackedBlocks
from covey.engine.onnx.builder import GraphBuilder
from covey.engine.onnx.kernel_file import KernelFile
from covey.engine.onnx.products import Products
from covey.engine.onnx.runtime import FILE_FOLDER, new_options, open_session
from covey.engine.onnx.session import give_back_memory

COLUMNS, ROWS, BLOCK = 2048, 8192, 32
SESSIONS: Final = 2
WAYS: Final = {  # whether exact, whether in a file, and what else a session is told
    "a file in memory, as it is": (False, True, {}),
    "each session packs": (False, False, {}),
    "each session packs, floats (level 0)": (True, False, {}),
    "nobody packs": (False, False, {"session.disable_prepacking": "1"}),
}
PEAK_OF_NOW: Final = "5"  # what makes Linux forget the most that was resident


def matrix(index: int, bits: int) -> PackedBlocks:
    random, blocks = np.random.default_rng(index), COLUMNS // BLOCK
    codes = random.integers(0, 256, (ROWS, blocks, BLOCK * bits // 8), np.uint8)
    return PackedBlocks(bits, BLOCK, codes, random.random((ROWS, blocks), np.float32), None)


def bytes_of(bits: int) -> int:
    return ROWS * COLUMNS * bits // 8 + ROWS * COLUMNS // BLOCK * FLOAT_BYTES


def held(name: str, path: str) -> int:
    """Bytes that Linux tells in a line of a file about this process."""
    lines = Path(f"/proc/self/{path}").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def now() -> int:
    give_back_memory()
    return held("Pss", "smaps_rollup")


def measure(way: str, count: int, bits: int) -> list[float]:
    """The most while the first session is made, what is held with it, and with a second one."""
    before = now()
    Path("/proc/self/clear_refs").write_text(PEAK_OF_NOW)
    makes = in_a_file(way, count, bits) if WAYS[way][1] else by_themselves(way, count, bits)
    first = next(makes)
    most, one = held("VmHWM", "status") - before, now() - before
    second = next(makes)
    two = now() - before
    assert first is not second
    return [each / count / bytes_of(bits) for each in (most, one, two)]


def in_a_file(way: str, count: int, bits: int) -> Iterator[Any]:
    """Sessions of one graph, whose matrices are packed once."""
    with KernelFile() as file:
        builder = built(way, count, bits, file)
        with file.named() as folder:
            for _ in range(SESSIONS):
                yield session_of(builder, {FILE_FOLDER: folder})


def by_themselves(way: str, count: int, bits: int) -> Iterator[Any]:
    """Each from codes that are there until it is made."""
    for _ in range(SESSIONS):
        builder = built(way, count, bits, None)
        session = session_of(builder, WAYS[way][2])
        del builder
        yield session


def built(way: str, count: int, bits: int, file: KernelFile | None) -> GraphBuilder:
    builder = GraphBuilder()
    adding = Products(builder, file, is_exact=WAYS[way][0])
    source = builder.input("source", np.float32, ["tokens", COLUMNS])
    for index in range(count):
        name = adding.matmuls(f"result.{index}", source, (matrix(index, bits),))[0]
        builder.output(name, np.float32, ["tokens", ROWS])
    return builder


def session_of(builder: GraphBuilder, entries: dict[str, str]) -> Any:
    """Once run, for what is taken then."""
    options = new_options(1)
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    session = open_session(builder.model(), options, builder.weights)
    session.run(None, {"source": np.ones((1, COLUMNS), np.float32)})
    return session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", type=int, default=12)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8])
    options = parser.parse_args()
    table = Table("bits", "way", "most while the first is made", "with one session", "with two")
    for bits in options.bits:
        for way in WAYS:
            with multiprocessing.get_context("spawn").Pool(1) as process:
                found = process.apply(measure, (way, options.matrices, bits))
            table.add_row(str(bits), way, *(f"{each:.2f}" for each in found))
    Console().print(table)


if __name__ == "__main__":
    main()
