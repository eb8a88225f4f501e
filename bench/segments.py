"""What it costs that a stage is several graphs: decoding with one and with as many as a large stage has, alternately.

python bench/segments.py MODEL.gguf [--rounds 7] [--threads 2]
"""

import argparse
import time
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
from bare_engine import load, spec_of

from covey.engine.contract import Piece
from covey.engine.onnx import portions
from covey.engine.onnx.stage import OnnxStage

PROMPT_TOKENS, DECODE_TOKENS = 32, 64


def stage_of(model: Path, threads: int, segments: int) -> OnnxStage:
    with patch.multiple(portions, GRAPHS=segments, GRAPH_BYTES_MIN=0):
        return load(spec_of(model, threads, PROMPT_TOKENS + DECODE_TOKENS))


def decode_ms(stage: OnnxStage) -> float:
    """Of one token, the median of a run."""
    stage.run([Piece(0, 0, PROMPT_TOKENS, wants_logits=True)], np.arange(PROMPT_TOKENS, dtype=np.int64))
    times: list[float] = []
    for position in range(PROMPT_TOKENS, PROMPT_TOKENS + DECODE_TOKENS):
        begun = time.perf_counter()
        stage.run([Piece(0, position, 1, wants_logits=True)], np.array([7], np.int64))
        times.append(time.perf_counter() - begun)
    return 1000 * median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    stages = {count: stage_of(asked.model, asked.threads, count) for count in (1, portions.GRAPHS)}
    found: dict[int, list[float]] = {count: [] for count in stages}
    for _ in range(asked.rounds):
        for count, stage in stages.items():
            found[count].append(decode_ms(stage))
    for count, times in found.items():
        print(f"{count} graphs: {median(times):.2f} ms a token, {median(times) / median(found[1]):.3f} of one graph")


if __name__ == "__main__":
    main()
