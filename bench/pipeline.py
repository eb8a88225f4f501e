"""Decode speed of two nodes on this machine against one, whole program: alternating runs, medians and their ratio.

    python bench/pipeline.py [--rounds 5] [--nodes 2] [--max-tokens 128]

Each run is `covey demo --once --json`, so it includes the link, the serving path and the HTTP server.
"""

import argparse
import json
import statistics
import subprocess
import sys

RUN_SECONDS_MAX = 180


def decode_speed(nodes: int, max_tokens: int) -> float:
    """Tokens/s of one demo run, as its head measured them."""
    options = ["--nodes", str(nodes), "--once", "--json", "--temperature", "0", "--max-tokens", str(max_tokens)]
    prompt = "Write a long story about a lighthouse keeper and the sea."
    command = [sys.executable, "-m", "covey.cli", "demo", *options, "--prompt", prompt]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS_MAX, check=True)
    return float(json.loads(done.stdout)["decode_tokens_per_second"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=128)
    options = parser.parse_args()
    single: list[float] = []
    split: list[float] = []
    for number in range(options.rounds):
        single.append(decode_speed(1, options.max_tokens))
        split.append(decode_speed(options.nodes, options.max_tokens))
        print(f"round {number + 1}: 1 node {single[-1]:.1f}, {options.nodes} nodes {split[-1]:.1f} tokens/s")
    ratios = [b / a for a, b in zip(single, split, strict=True)]
    one, many = statistics.median(single), statistics.median(split)
    print(f"median: 1 node {one:.1f}, {options.nodes} nodes {many:.1f} tokens/s, ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
