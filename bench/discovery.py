"""How long two nodes that start together need to see each other, and how long until a killed one is shown as away.

    python bench/discovery.py [--rounds 5]

Both are measured at the HTTP API (`members` of `GET /cluster`), polled every 20 ms, from the moment that both
nodes answer (processes take a second to start) and from the SIGKILL.
"""

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx2

WAIT_SECONDS_MAX = 20.0
POLL_SECONDS = 0.02


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start(folder: Path, port: int, cluster: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "COVEY_CLUSTER": cluster}
    command = [sys.executable, "-m", "covey.cli", "up", "--port", str(port), "--data-dir", str(folder)]
    command += ["--interface", "127.0.0.1"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def seen(port: int) -> int:
    """How many visible nodes the node at `port` shows; 0 while it does not answer."""
    try:
        state = httpx2.get(f"http://127.0.0.1:{port}/cluster", timeout=5).json()
    except httpx2.TransportError:
        return 0
    return sum(member["visibility"] == "visible" for member in state["members"])


def seconds_until(condition: Callable[[], bool]) -> float:
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > WAIT_SECONDS_MAX:
            raise TimeoutError
        time.sleep(POLL_SECONDS)
    return time.monotonic() - started


def measure(folder: Path, number: int) -> tuple[float, float]:
    """(seconds until both see each other, seconds until the killed one is away) of one pair of nodes."""
    ports = [free_port(), free_port()]
    cluster = f"bench-{os.getpid()}-{number}"
    nodes = [start(folder / f"{number}-{port}", port, cluster) for port in ports]
    try:
        seconds_until(lambda: all(seen(port) >= 1 for port in ports))
        together = seconds_until(lambda: all(seen(port) == len(ports) for port in ports))
        nodes[1].send_signal(signal.SIGKILL)
        away = seconds_until(lambda: seen(ports[0]) == 1)
    finally:
        for node in nodes:
            node.terminate()
            node.wait(timeout=20)
    return together, away


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(parser.parse_args().rounds):
            rounds.append(measure(Path(folder), number))
            print(f"round {number + 1}: together after {rounds[-1][0]:.2f} s, away after {rounds[-1][1]:.2f} s")
    for name, values in zip(("together", "away"), zip(*rounds, strict=True), strict=True):
        print(f"{name}: median {statistics.median(values):.2f} s, worst {max(values):.2f} s")


if __name__ == "__main__":
    main()
