"""What the runner itself costs per token: real processes over loopback, with an engine that computes next to nothing.

    python bench/runner_overhead.py [--tokens 2000] [--repeats 5]

For one, two and three stages, and for one and four requests at once, prints the time per token at the client (best
and median), and the processor time per token of all runners together, which a busy machine disturbs less. All of it
is scheduling, sampling, links and events, and the fake engine's own small part.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the harness lives with the tests

from tests.engine.harness import Client, Runner, make_admit, pipeline

OPTIONS = {"vocabulary_size": "64"}


def seconds_per_token(port: int, requests: int, tokens: int) -> float:
    admits = [make_admit(f"r{number}", [number + 1], tokens) for number in range(requests)]
    with Client(port) as client:
        started = time.perf_counter()
        client.send(*admits)
        client.events_of_all([admit.request_id for admit in admits])
        return (time.perf_counter() - started) / (tokens * requests)


def processor_seconds(runners: list[Runner]) -> float:
    return sum(sum(psutil.Process(runner.process.pid).cpu_times()[:2]) for runner in runners)


def measure(stages: int, requests: int, tokens: int, repeats: int) -> tuple[float, float, float]:
    """Microseconds per token: best, median, processor time."""
    with pipeline(stages, engine_options=OPTIONS, context_length=tokens + 8) as (runners, port):
        seconds_per_token(port, requests, 200)
        before = processor_seconds(runners)
        times = [1e6 * seconds_per_token(port, requests, tokens) for _ in range(repeats)]
        busy = 1e6 * (processor_seconds(runners) - before) / (repeats * requests * tokens)
        return min(times), statistics.median(times), busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print("stages  requests  best us/token  median  processor")
    for stages in (1, 2, 3):
        for requests in (1, 4):
            best, median, busy = measure(stages, requests, options.tokens, options.repeats)
            print(f"{stages:6}  {requests:8}  {best:13.0f}  {median:6.0f}  {busy:9.0f}", flush=True)


if __name__ == "__main__":
    main()
