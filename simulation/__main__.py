"""`python -m simulation --seed 7 --seeds 200 [--trace]`: runs so many seeds from that one on, one verdict each."""

import argparse
import sys
import time

from simulation.run import run, run_all
from simulation.trace import Trace
from simulation.world import World


def watch(world: World) -> None:
    print(f"faults: {world.faults}")
    Trace(world, print)


def main() -> int:
    parser = argparse.ArgumentParser(prog="simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--trace", action="store_true", help="show what happens")
    options = parser.parse_args()
    began_s = time.monotonic()
    failed = 0
    seeds = range(options.seed, options.seed + options.seeds)
    for verdict in (run(seed, watch) for seed in seeds) if options.trace else run_all(seeds):
        failed += verdict.problem is not None
        if verdict.problem or options.trace or options.seeds == 1:
            print(verdict.line(), flush=True)
    print(f"{options.seeds} seeds, {failed} failed, {time.monotonic() - began_s:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
