"""Machines with little memory: a control group limits what one node and its runners have. Linux, as root.

Version 2: https://docs.kernel.org/admin-guide/cgroup-v2.html; version 1:
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html.
"""

import os
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")
EMPTY_S_MAX = 10.0


class MemoryGroup:
    def __init__(self, name: str) -> None:
        self.name = name
        is_second = "memory" in _words(ROOT / "cgroup.controllers")
        self._folder = (ROOT if is_second else ROOT / "memory") / f"covey-{os.getpid()}-{name}"
        self._limit = self._folder / ("memory.max" if is_second else "memory.limit_in_bytes")
        self._folder.mkdir()

    def limit(self, count: int) -> None:
        """In bytes. Raises `OSError` where memory can't be limited."""
        self._limit.write_text(str(count))

    def command(self) -> list[str]:
        """Runs what follows it inside, on what looks like a machine of this name."""
        script = f'echo $$ > {self._folder}/cgroup.procs && hostname {self.name} && exec "$@"'
        return ["unshare", "--uts", "sh", "-c", script, "sh"]

    def remove(self) -> None:
        """It may be a moment until the last of its processes is out."""
        deadline = time.monotonic() + EMPTY_S_MAX
        while self._folder.exists():
            with suppress(OSError):
                self._folder.rmdir()
            assert time.monotonic() < deadline, f"{self._folder} does not become empty"
            time.sleep(0.05)


@contextmanager
def memory_group(name: str, limit_bytes: int) -> Generator[MemoryGroup]:
    """Skips the test where there can be none."""
    try:
        group = MemoryGroup(name)
    except OSError as error:
        pytest.skip(f"control groups can't be made here: {error}")
    try:
        try:
            group.limit(limit_bytes)
            subprocess.run(["unshare", "--uts", "true"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"memory can't be limited here: {error}")
        yield group
    finally:
        group.remove()


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
