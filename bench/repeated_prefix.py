"""What the prefix cache spares: the time to the first token of a long prompt, and of another with the same beginning.

    python bench/repeated_prefix.py FILE.gguf [--rounds 5] [--shared-tokens 2000]

A whole node, asked over HTTP by the client of `covey bench`. Each round has a beginning of its own. The second prompt
ends with another question than the first, so only the beginning can come from the cache.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from statistics import median

from one_node import serving

from covey.cli.benching.asking import Server, ask_together
from covey.cli.benching.cluster import ClusterSide, chosen
from covey.cli.benching.prompts import Prompts
from covey.cli.client import CliError
from covey.cli.demo import ends_by_signal

SPARE_TOKENS = 256
NEW_TOKENS = 2
QUESTIONS = ("Which animals live there?", "What do people do in winter?")


def first_token_s(server: Server, prompt: str) -> tuple[float, int]:
    """From sending the request on, and how many of its tokens were cached. Raises `CliError`."""
    (sample,) = ask_together(server, [prompt], NEW_TOKENS)
    return sample.pieces_s[0] - sample.sent_s, sample.cached_tokens


def count_tokens(server: Server, prompt: str) -> int:
    (sample,) = ask_together(server, [prompt], NEW_TOKENS)
    return sample.prompt_tokens


def measure(server: Server, options: argparse.Namespace) -> list[float]:
    """The ratio of each round. Raises `CliError`."""
    prompts, ratios = Prompts(1, partial(count_tokens, server)), list[float]()
    for number in range(options.rounds):
        beginning = prompts.of(options.shared_tokens)
        (first, _), (second, cached) = (first_token_s(server, f"{beginning} {question}") for question in QUESTIONS)
        ratios.append(second / first)
        print(f"round {number}: {first:.3f} s, then {second:.3f} s with {cached} tokens from the cache", flush=True)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shared-tokens", type=int, default=2000)
    options = parser.parse_args()
    context_length = options.shared_tokens + SPARE_TOKENS
    with ends_by_signal(), serving(options.model, slots=2, context_length=context_length) as node:
        ratios = measure(ClusterSide(node, chosen(node.cluster(), None)).server, options)
    print(f"median: {median(ratios):.3f} of the time ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    try:
        main()
    except CliError as error:
        sys.exit(str(error))
