"""A KV cache in 16-bit floats against one in 32 bits: how fast prompts are read and tokens follow, by what came before.

    python bench/cache_types.py FILE.gguf [--lengths 320 1000 4000] [--tokens 24] [--rounds 5] [--threads 2] [--exact]

Two engines on the same file. In a round each reads prompts of these lengths, in chunks as the scheduler cuts them, each
into a slot of its own, and goes on for some tokens after each; the types take turns. Medians are told, also of ratios
within rounds. What it takes in memory `bench/memory.py --kv-cache f16` tells.
"""

import argparse
import statistics
import time
from itertools import product
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from bare_engine import load, spec_of
from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

from covey.engine.contract import Piece
from covey.engine.onnx.stage import OnnxStage
from covey.schema.generation import PREFILL_CHUNK_TOKENS
from covey.schema.model import KvCacheType

MILLISECONDS: Final = 1000
TOKEN_IDS: Final = 1000  # of which random texts are made


class Times(NamedTuple):
    prompt_s: float
    token_s: float  # of each one after it


Taken = dict[tuple[KvCacheType, int], list[Times]]  # by the length of the prompt


def loaded(options: argparse.Namespace, kind: KvCacheType) -> OnnxStage:
    spec = spec_of(options.model, options.threads, max(options.lengths) + options.tokens, exact=options.exact)
    return load(replace(spec, slot_count=len(options.lengths), engine_options=spec.engine_options | {"kv_cache": kind}))


def read(stage: OnnxStage, slot: int, prompt: np.ndarray) -> None:
    for start in range(0, len(prompt), PREFILL_CHUNK_TOKENS):
        chunk = prompt[start : start + PREFILL_CHUNK_TOKENS]
        stage.run([Piece(slot, start, len(chunk), wants_logits=start + len(chunk) == len(prompt))], chunk)


def go_on(stage: OnnxStage, slot: int, position: int, tokens: np.ndarray) -> None:
    for index in range(len(tokens)):
        stage.run([Piece(slot, position + index, 1, wants_logits=True)], tokens[index : index + 1])


def measure(options: argparse.Namespace) -> Taken:
    tokens = np.random.default_rng(1).integers(0, TOKEN_IDS, max(options.lengths) + options.tokens)
    stages = {kind: loaded(options, kind) for kind in KvCacheType}
    taken: Taken = {}
    for _, (slot, length) in product(range(options.rounds), enumerate(options.lengths)):
        for kind, stage in stages.items():
            began_s = time.perf_counter()
            read(stage, slot, tokens[:length])
            read_s = time.perf_counter()
            go_on(stage, slot, length, tokens[length : length + options.tokens])
            times = Times(read_s - began_s, (time.perf_counter() - read_s) / options.tokens)
            taken.setdefault((kind, length), []).append(times)
    return taken


def row(own: list[Times], others: list[Times]) -> tuple[str, ...]:
    """`others`: of the same rounds in float32."""
    pairs = list(zip(own, others, strict=True))
    prompts = statistics.median(other.prompt_s / one.prompt_s for one, other in pairs)
    tokens = statistics.median(other.token_s / one.token_s for one, other in pairs)
    prompt_s, token_s = (statistics.median(each[part] for each in own) for part in (0, 1))
    return f"{prompt_s:.2f}", f"{token_s * MILLISECONDS:.2f}", f"{prompts:.2f}", f"{tokens:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[320, 1000, 4000], help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=24, help="after each prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--exact", action="store_true")
    options = parser.parse_args()
    taken = measure(options)
    table = Table("tokens before", "cache", "prompt (s)", "a token (ms)", "prompt: as fast as f32", "a token")
    for length, kind in product(options.lengths, KvCacheType):
        table.add_row(str(length), kind.value, *row(taken[kind, length], taken[KvCacheType.F32, length]))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
