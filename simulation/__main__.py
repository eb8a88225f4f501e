"""`python -m simulation [--seed FIRST] [--seeds COUNT] [--trace]`: plays seeds, prints a verdict for each failure."""

import argparse
import sys
import time

from simulation.run import run_seed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=200, help="how many seeds")
    parser.add_argument("--trace", action="store_true", help="print each input and effect")
    options = parser.parse_args()
    started, failures, steps = time.monotonic(), 0, 0
    for seed in range(options.seed, options.seed + options.seeds):
        verdict = run_seed(seed, print if options.trace else None)
        steps += verdict.steps
        failures += bool(verdict.sentence)
        if verdict.sentence or options.seeds == 1:
            print(verdict.line(), flush=True)
    seconds = time.monotonic() - started
    print(f"{options.seeds} seeds, {failures} failed, {steps} steps, {seconds:.1f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
