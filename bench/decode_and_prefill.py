"""Decode and prefill of the ONNX engine against llama.cpp's own `llama-bench`, alternating in one run.

    python bench/decode_and_prefill.py --model FILE.gguf --threads 2 --rounds 5 --llama-bench PATH [--json]
    python bench/decode_and_prefill.py --model FILE.gguf --threads 2 --rounds 5 --exact

A round is one prefill of 512 tokens (or --prompt-tokens) and 64 decode steps from an empty cache, in each program, as
`llama-bench -p 512 -n 64` does; ours in chunks, as the scheduler cuts prompts. Whatever else the machine does meets
both, so ratios hold better than absolute figures. Medians are printed. With --exact the engine is compared with itself
in exact mode.
"""

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np
from bare_engine import load, spec_of
from rich.console import Console
from rich.table import Table

from covey.engine.contract import Piece
from covey.engine.onnx.stage import OnnxStage
from covey.schema.generation import PREFILL_CHUNK_TOKENS

DECODE_TOKENS = 64
MEASURES = ("prefill", "decode")


def measure_ours(stage: OnnxStage, token_ids: np.ndarray) -> dict[str, float]:
    """Tokens per second."""
    started = time.perf_counter()
    for start in range(0, len(token_ids), PREFILL_CHUNK_TOKENS):
        chunk = token_ids[start : start + PREFILL_CHUNK_TOKENS]
        is_last = start + len(chunk) == len(token_ids)
        stage.run([Piece(0, start, len(chunk), wants_logits=is_last)], chunk)
    prefilled = time.perf_counter()
    for position in range(DECODE_TOKENS):
        stage.run([Piece(0, position, 1, wants_logits=True)], token_ids[position : position + 1])
    decoded = time.perf_counter()
    return {"prefill": len(token_ids) / (prefilled - started), "decode": DECODE_TOKENS / (decoded - prefilled)}


def measure_llama(program: Path, model: Path, threads: int, prompt_tokens: int) -> dict[str, float]:
    command = [program, "-m", model, "-t", str(threads), "-r", "1", "-o", "json"]
    command += ["-p", str(prompt_tokens), "-n", str(DECODE_TOKENS)]
    output = subprocess.run(command, capture_output=True, check=True, timeout=600).stdout
    results = json.loads(output)
    return {"prefill" if result["n_prompt"] else "decode": result["avg_ts"] for result in results}


def compare(
    model: Path, threads: int, rounds: int, prompt_tokens: int, program: Path | None, *, with_exact: bool
) -> dict[str, dict[str, float]]:
    stage = load(spec_of(model, threads, prompt_tokens + DECODE_TOKENS))
    exact = load(spec_of(model, threads, prompt_tokens + DECODE_TOKENS, exact=True)) if with_exact else None
    token_ids = np.random.default_rng(1).integers(0, 1000, prompt_tokens)
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(measure_ours(stage, token_ids))
        if exact is not None:
            theirs.append(measure_ours(exact, token_ids))
        elif program is not None:
            theirs.append(measure_llama(program, model, threads, prompt_tokens))
    found = {"covey": medians(ours)}
    if theirs:
        found["exact" if exact else "llama.cpp"] = medians(theirs)
        pairs = list(zip(ours, theirs, strict=True))
        found["ratio"] = medians([{name: our[name] / their[name] for name in MEASURES} for our, their in pairs])
    return found


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in rounds) for name in MEASURES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    compared = parser.add_mutually_exclusive_group()
    compared.add_argument("--exact", action="store_true", help="compare with our own exact mode")
    compared.add_argument("--llama-bench", type=Path, help="llama.cpp's llama-bench; without it only our own figures")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    size, program = options.prompt_tokens, options.llama_bench
    found = compare(options.model, options.threads, options.rounds, size, program, with_exact=options.exact)
    if options.json:
        print(json.dumps({"model": options.model.name, "threads": options.threads, "rounds": options.rounds, **found}))
        return
    table = Table(title=f"{options.model.name}, {options.threads} threads, medians of {options.rounds} rounds")
    for heading in ("", f"prefill {size} (tokens/s)", f"decode {DECODE_TOKENS} (tokens/s)"):
        table.add_column(heading, justify="right")
    for name, figures in found.items():
        table.add_row(name, *(f"{figures[measure]:.2f}" for measure in MEASURES))
    Console().print(table)


if __name__ == "__main__":
    main()
