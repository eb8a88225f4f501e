"""Two engines that compute at once on one machine: with all cores each, or with a part of them each.

    python bench/sharing_cores.py FILE.gguf [--rounds 5] [--tokens 64]

Processes of their own, as two runners of one node are. Each round decodes with one engine alone, then with two at once
that have all cores each, as runners do, then with two that are held to one half of the cores each. Linux only.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import numpy as np
from bare_engine import load, spec_of
from rich.console import Console
from rich.table import Table

from covey.engine.contract import Piece

PAST_TOKENS: Final = 64
CONTEXT: Final = 1024
SECONDS_MAX: Final = 300


class Engine:
    """One in a process of its own, on these cores with as many threads."""

    def __init__(self, model: Path, cores: Sequence[int], tokens: int) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        arguments = (theirs, model, tuple(cores), tokens)
        self._process = multiprocessing.get_context("spawn").Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        self.answer()  # it has loaded

    def begin(self) -> None:
        self._connection.send(None)

    def answer(self) -> float:
        """Tokens/s."""
        if not self._connection.poll(SECONDS_MAX):
            raise TimeoutError(f"an engine did not answer within {SECONDS_MAX} s")
        return self._connection.recv()

    def end(self) -> None:
        self._process.terminate()
        self._process.join()


def serve(connection: Connection, model: Path, cores: tuple[int, ...], tokens: int) -> None:
    os.sched_setaffinity(0, cores)
    stage = load(spec_of(model, len(cores), CONTEXT))
    ids = np.arange(PAST_TOKENS + tokens) % 1000
    stage.run([Piece(0, 0, PAST_TOKENS, wants_logits=True)], ids[:PAST_TOKENS])
    connection.send(0.0)
    while True:
        connection.recv()
        began = time.perf_counter()
        for position in range(PAST_TOKENS, PAST_TOKENS + tokens):
            stage.run([Piece(0, position, 1, wants_logits=True)], ids[position : position + 1])
        connection.send(tokens / (time.perf_counter() - began))


def together(engines: Sequence[Engine]) -> float:
    """Tokens/s of all that decode at once."""
    for engine in engines:
        engine.begin()
    return sum(engine.answer() for engine in engines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    if not half:
        parser.error("there is one core only")
    wide = [Engine(options.model, cores, options.tokens) for _ in range(2)]
    narrow = [Engine(options.model, part, options.tokens) for part in (cores[:half], cores[half:])]
    ways = {"one alone": wide[:1], "two, all cores each": wide, "two, half of the cores each": narrow}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, engines in ways.items():
            found[name].append(together(engines))
    table = Table("engines", "tokens/s in all", "over all cores each")
    for name, speeds in found.items():
        ratio = statistics.median(a / b for a, b in zip(speeds, found["two, all cores each"], strict=True))
        table.add_row(name, f"{statistics.median(speeds):.1f}", f"{ratio:.2f}")
    Console().print(table)
    for engine in (*wide, *narrow):
        engine.end()


if __name__ == "__main__":
    main()
