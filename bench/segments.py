"""What it costs that a stage is several graphs: decoding with one, two and three, alternately.

python bench/segments.py MODEL.gguf [--rounds 7] [--threads 2]
"""

import argparse
import time
from pathlib import Path
from statistics import median

import numpy as np

from covey.checkpoints.gguf_file import read_header
from covey.engine.contract import Piece
from covey.engine.onnx.stage import OnnxStage
from covey.schema.ids import RunnerId
from covey.schema.model import Shard
from covey.schema.runner import RunnerSpec

PROMPT_TOKENS, DECODE_TOKENS = 32, 64


def spec_of(model: Path, threads: int, start: int, end: int) -> RunnerSpec:
    return RunnerSpec(
        runner_id=RunnerId("bench"),
        instance_id="bench",
        engine="onnx",
        model_path=str(model),
        shard=Shard(start, end, read_header(model).metadata["llama.block_count"]),
        stage_index=0,
        stage_count=1,
        stage_node_ids=(),
        context_length=PROMPT_TOKENS + DECODE_TOKENS,
        slot_count=1,
        thread_count=threads,
        listen_host="127.0.0.1",
        connect_ms=20_000,
    )


def stage_of(model: Path, threads: int, segments: int) -> OnnxStage:
    """Grown as a survivor grows: one part more at a time."""
    layers = read_header(model).metadata["llama.block_count"]
    stage = OnnxStage()
    for count in range(1, segments + 1):
        stage.load(spec_of(model, threads, 0, layers * count // segments), lambda _: None)
    return stage


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
    stages = {count: stage_of(asked.model, asked.threads, count) for count in (1, 2, 3)}
    found: dict[int, list[float]] = {count: [] for count in stages}
    for _ in range(asked.rounds):
        for count, stage in stages.items():
            found[count].append(decode_ms(stage))
    for count, times in found.items():
        print(f"{count} graphs: {median(times):.2f} ms a token, {median(times) / median(found[1]):.3f} of one graph")


if __name__ == "__main__":
    main()
