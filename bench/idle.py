"""What an idle cluster costs: bytes written to disk, processor time and memory of every process, over some minutes.

    python bench/idle.py [--nodes 3] [--minutes 10]

The nodes are those of `covey demo`, with its model loaded and one question answered; then nobody asks anything. Exits
with 1 if a process wrote to disk, took 1 % of a core, or grew by 5 MB. Linux only: bytes are those of /proc/PID/io.
"""

import argparse
import signal
import subprocess
import sys
import time

import psutil
from rich.console import Console
from rich.table import Table

START_SECONDS_MAX = 180
REST_SECONDS = 30  # after the question: caches settle
CORE_PERCENT_MAX = 1.0
GROWTH_BYTES_MAX = 5_000_000
MEGABYTE = 10**6


def role(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    known = {"covey.engine": "runner", "mesh_process": "mesh", " demo": "demo", " up": "node"}
    return next((name for mark, name in known.items() if mark in line), line[:60])


class Sample:
    """What one process has used since its start."""

    def __init__(self, process: psutil.Process) -> None:
        self.role = role(process)
        self.written_bytes = process.io_counters().write_bytes
        times = process.cpu_times()
        self.processor_seconds = times.user + times.system
        self.resident_bytes = process.memory_info().rss


def start_demo(nodes: int) -> subprocess.Popen[str]:
    """Returns once it has answered; the rest of what it says is not read."""
    command = [sys.executable, "-m", "covey.cli", "demo", "--nodes", str(nodes), "--max-tokens", "16"]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert demo.stdout is not None
    deadline = time.monotonic() + START_SECONDS_MAX
    for line in demo.stdout:
        if "Ctrl-C" in line:
            return demo
        if time.monotonic() > deadline:
            break
    demo.send_signal(signal.SIGINT)
    raise SystemExit("the demo did not come to its end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=10)
    options = parser.parse_args()
    demo = start_demo(options.nodes)
    try:
        time.sleep(REST_SECONDS)
        parent = psutil.Process(demo.pid)
        before = {process: Sample(process) for process in (parent, *parent.children(recursive=True))}
        time.sleep(options.minutes * 60)
        after = {process: Sample(process) for process in before}
    finally:
        demo.send_signal(signal.SIGINT)
        demo.wait(timeout=30)
    is_idle = show(before, after, options.minutes)
    sys.exit(0 if is_idle else 1)


def show(before: dict[psutil.Process, Sample], after: dict[psutil.Process, Sample], minutes: float) -> bool:
    """Prints a line for each process; True if all are within the limits."""
    table = Table("process", "written (bytes)", "of a core (%)", "memory (MB)", "growth (MB)")
    table.title = f"{len(before)} processes, idle for {minutes:g} minutes"
    is_idle = True
    for process, first in before.items():
        last = after[process]
        written = last.written_bytes - first.written_bytes
        percent = 100 * (last.processor_seconds - first.processor_seconds) / (60 * minutes)
        growth = last.resident_bytes - first.resident_bytes
        is_idle &= written == 0 and percent < CORE_PERCENT_MAX and growth < GROWTH_BYTES_MAX
        memory = f"{last.resident_bytes / MEGABYTE:.0f}"
        table.add_row(first.role, f"{written}", f"{percent:.2f}", memory, f"{growth / MEGABYTE:+.1f}")
    Console().print(table)
    return is_idle


if __name__ == "__main__":
    main()
