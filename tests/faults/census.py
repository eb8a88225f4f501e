"""What our processes hold: counted before a fault and after it, and compared."""

import os
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from covey.effects import leftovers

MIB = 1024 * 1024
FILES_PASSING = (".stderr", "-wal", "-shm", "-journal", ".log")  # the test's own, SQLite's, and bounded ones


def ours(home: Path) -> list[psutil.Process]:
    """All processes that were started for nodes under this home, whoever is their parent now."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            is_ours = process.pid != os.getpid() and process.environ().get("COVEY_HOME", "").startswith(str(home))
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def family(process_id: int) -> list[psutil.Process]:
    """A node's process and all that it has started; nothing if it has ended."""
    with suppress(psutil.Error):
        node = psutil.Process(process_id)
        return [node, *node.children(recursive=True)]
    return []


def orphans(home: Path, node_process_ids: Iterable[int]) -> list[psutil.Process]:
    """Those of `ours` that belong to no living node."""
    kept = {each.pid for node in node_process_ids for each in family(node)}
    return [each for each in ours(home) if each.pid not in kept]


def resident_bytes(processes: Iterable[psutil.Process]) -> int:
    total = 0
    for process in processes:
        with suppress(psutil.Error):
            total += process.memory_info().rss
    return total


def descriptors(process_id: int) -> int:
    return psutil.Process(process_id).num_fds()


def files(folders: Collection[Path]) -> set[Path]:
    return {
        path
        for folder in folders
        for path in folder.rglob("*")
        if not path.is_dir() and not path.name.endswith(FILES_PASSING) and not is_note_of_living(path)
    }


def is_note_of_living(path: Path) -> bool:
    """Whether it notes a process that a node has started and that lives."""
    return path.parent.name == leftovers.FOLDER and path.name.isdigit() and psutil.pid_exists(int(path.name))


@dataclass
class Census:
    """At one moment at which nothing was to do. `descriptors` and `resident` of nodes, by process id."""

    process_count: int
    descriptors: dict[int, int]
    resident: dict[int, int]
    resident_bytes: int  # of all processes
    files: set[Path]

    def told(self) -> dict[str, Any]:
        counts = {"processes": self.process_count, "descriptors": sum(self.descriptors.values())}
        return counts | {"files": len(self.files), "resident_mib": round(self.resident_bytes / MIB)}


def take(home: Path, node_process_ids: Collection[int]) -> Census:
    processes = ours(home)
    return Census(
        len(processes),
        {each: descriptors(each) for each in node_process_ids},
        {each: resident_bytes([psutil.Process(each)]) for each in node_process_ids},
        resident_bytes(processes),
        files([home]),
    )


DESCRIPTORS_SPARE = 4  # a connection that is kept for the next request, to each of the others


def leaks(before: Census, after: Census) -> list[str]:
    """What is there now that was not, one sentence each."""
    found = [f"the file {path.name} was left behind" for path in sorted(after.files - before.files)]
    if after.process_count > before.process_count:
        found.append(f"{after.process_count} processes instead of {before.process_count}")
    for node in before.descriptors.keys() & after.descriptors.keys():
        count = after.descriptors[node] - before.descriptors[node]
        if count > DESCRIPTORS_SPARE:
            found.append(f"process {node} has {count} more file descriptors")
    return found


def settled(
    before: Census, home: Path, node_process_ids: Collection[int], timeout_s: float
) -> tuple[Census, list[str]]:
    """A census without leaks, or the last one."""
    deadline = time.monotonic() + timeout_s
    while True:
        after = take(home, node_process_ids)
        found = leaks(before, after)
        if not found or time.monotonic() > deadline:
            return after, found
        time.sleep(0.5)
