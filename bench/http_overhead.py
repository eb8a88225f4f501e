"""What HTTP and serving cost: the time per token that a client sees, against the engine alone, in turn.

    python bench/http_overhead.py FILE.gguf [--rounds 9] [--threads 2] [--temperature 0.7]
        [--prompt-tokens 128] [--new-tokens 128]

The engine alone is a loop around its step, in this process. The other is a whole node: HTTP, serving, scheduler,
sampling, and text, asked by the client of `covey bench`. One request at a time, at the same positions of the context,
greedy if no temperature is given. The node guesses nothing: several tokens of one step would hide what is measured.
Give --threads what the node's runner has: the physical cores.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
from bare_engine import load, spec_of
from one_node import serving

from covey.cli.benching.asking import Server, ask_together
from covey.cli.benching.cluster import ClusterSide, chosen
from covey.cli.benching.prompts import Prompts
from covey.cli.client import CliError
from covey.cli.demo import ends_by_signal
from covey.engine.contract import Piece
from covey.engine.onnx.stage import OnnxStage

SPARE_TOKENS = 128
TOKEN = 7  # which one is the same to the engine


def engine_ms(stage: OnnxStage, prompt_tokens: int, new_tokens: int) -> float:
    """Of a token after the first."""
    stage.run([Piece(0, 0, prompt_tokens, wants_logits=True)], np.full(prompt_tokens, TOKEN, np.int64))
    token, began = np.array([TOKEN], np.int64), time.perf_counter()
    for position in range(prompt_tokens, prompt_tokens + new_tokens - 1):
        stage.run([Piece(0, position, 1, wants_logits=True)], token)
    return 1000 * (time.perf_counter() - began) / (new_tokens - 1)


def http_ms(server: Server, prompt: str, new_tokens: int, temperature: float = 0) -> tuple[int, float]:
    """The tokens of the prompt, and the time of one after the first. Raises `CliError`."""
    (sample,) = ask_together(server, [prompt], new_tokens, {"temperature": temperature})
    return sample.prompt_tokens, 1000 * (sample.pieces_s[-1] - sample.pieces_s[0]) / (sample.new_tokens - 1)


def measure(options: argparse.Namespace, server: Server, context_length: int) -> list[tuple[float, float]]:
    """Of each round but the first: the engine alone, and over HTTP, in milliseconds. Raises `CliError`."""
    prompts = Prompts(1, lambda prompt: http_ms(server, prompt, 2)[0])
    stage, rounds = load(spec_of(options.model, options.threads, context_length)), list[tuple[float, float]]()
    for number in range(options.rounds + 1):
        prompt_tokens, served = http_ms(
            server, prompts.of(options.prompt_tokens), options.new_tokens, options.temperature
        )
        rounds.append((engine_ms(stage, prompt_tokens, options.new_tokens), served))
        print(f"round {number}: engine {rounds[-1][0]:.2f} ms a token, over HTTP {served:.2f}", flush=True)
    return rounds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    options = parser.parse_args()
    context_length = options.prompt_tokens + options.new_tokens + SPARE_TOKENS
    serve = partial(serving, options.model, slots=1, context_length=context_length, lookup="0")
    with ends_by_signal(), serve() as node:
        server = ClusterSide(node, chosen(node.cluster(), None)).server
        rounds = measure(options, server, context_length)
    alone, served = (statistics.median(times) for times in zip(*rounds, strict=True))
    ratios = sorted(over / engine for engine, over in rounds)
    print(f"median: engine {alone:.2f} ms a token, over HTTP {served:.2f}: {statistics.median(ratios):.3f} x ", end="")
    print(f"({ratios[0]:.3f} to {ratios[-1]:.3f})")


if __name__ == "__main__":
    try:
        main()
    except CliError as error:
        sys.exit(str(error))
