"""What a step costs by how many tokens it has: of as many slots, as requests are decoded together, or of one.

    python bench/rows.py FILE.gguf [--threads 2] [--past 320] [--rounds 9]

The engine alone; medians of rounds that take all counts in turn. Several tokens of one slot are what checks guesses, be
they looked up or a draft model's: that pays where a step of so many takes not much longer than a step of one.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Final

import numpy as np
from bare_engine import load, spec_of
from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

from covey.engine.contract import Piece
from covey.engine.onnx.stage import OnnxStage
from covey.schema.generation import PREFILL_CHUNK_TOKENS

COUNTS: Final = (1, 2, 3, 4, 5, 8)


def fill(stage: OnnxStage, slot: int, past: int) -> None:
    for start in range(0, past, PREFILL_CHUNK_TOKENS):
        count = min(PREFILL_CHUNK_TOKENS, past - start)
        stage.run([Piece(slot, start, count, wants_logits=True)], np.arange(count))


def milliseconds(stage: OnnxStage, pieces: list[Piece]) -> float:
    tokens = np.arange(sum(piece.token_count for piece in pieces))
    began = time.perf_counter()
    stage.run(pieces, tokens)
    return 1000 * (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--past", type=int, default=320, help="tokens that each slot holds before")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    past, most = options.past, max(COUNTS)
    stage = load(replace(spec_of(options.model, options.threads, past + most), slot_count=most))
    for slot in range(most):
        fill(stage, slot, past)
    ways = {
        "of as many slots": lambda count: [Piece(slot, past, 1, wants_logits=True) for slot in range(count)],
        "of one slot": lambda count: [Piece(0, past, count, wants_logits=True, guess_count=count - 1)],
    }
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(options.rounds):
        for way, pieces in ways.items():
            for count in COUNTS:
                found.setdefault((way, count), []).append(milliseconds(stage, pieces(count)))
    table = Table("tokens in a step", *(f"{way}: ms (times one)" for way in ways))
    for count in COUNTS:
        row = [statistics.median(found[way, count]) for way in ways]
        ones = [statistics.median(found[way, 1]) for way in ways]
        table.add_row(str(count), *(f"{each:.1f} ({each / one:.2f})" for each, one in zip(row, ones, strict=True)))
    Console().print(table)


if __name__ == "__main__":
    main()
