"""The limits that Linux control groups set for this process: a container's memory and share of the processors.

Version 2: https://docs.kernel.org/admin-guide/cgroup-v2.html; version 1:
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html. A limit may sit at any level above the process, so all
levels are looked at. Elsewhere, and where nothing is limited, there is simply none.
"""

import os
from pathlib import Path
from typing import Final

import psutil
from msgspec import Struct

from covey.engine.cores import PROCESSORS, cores_of

ROOT: Final = Path("/sys/fs/cgroup")
MEMBERSHIP: Final = Path("/proc/self/cgroup")
UNLIMITED_BYTES: Final = 1 << 60  # version 1 writes a number near 2^63 for "no limit"


class MemoryRoom(Struct, frozen=True):
    limit_bytes: int
    free_bytes: int  # counts file cache that the kernel would give up


class _Files(Struct, frozen=True):
    """How a version names what we read."""

    limit: str
    usage: str
    reclaimable: str  # a row of memory.stat


_VERSION_2: Final = _Files("memory.max", "memory.current", "inactive_file")
_VERSION_1: Final = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def memory_room(root: Path = ROOT, membership: Path = MEMBERSHIP) -> list[MemoryRoom]:
    """One entry for each level that limits memory."""
    rooms: list[MemoryRoom] = []
    for controllers, path in _memberships(membership):
        if controllers == "":
            rooms += _rooms(root, path, _VERSION_2)
        elif "memory" in controllers.split(","):
            rooms += _rooms(root / "memory", path, _VERSION_1)
    return rooms


def processor_count(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int:
    """Logical processors that this process may keep busy, at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for controllers, path in _memberships(membership):
        if controllers == "":
            for level in _levels(root, path):
                count = min(count, _quota(level, count))
    return max(1, count)


def core_count(root: Path = ROOT, membership: Path = MEMBERSHIP, processors: Path = PROCESSORS) -> int:
    """Physical cores that this process may keep busy, at least 1.

    Two threads of one core don't compute faster than one, so of the processors that it may run on, those of one core
    count once.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    physical = len(cores_of(allowed, processors)) or psutil.cpu_count(logical=False)
    logical = processor_count(root, membership)
    return max(1, min(physical or logical, logical))


def _quota(level: Path, unlimited: int) -> int:
    """Whole processors by `cpu.max` ("quota period", in microseconds), rounded up."""
    quota, _, period = _read(level / "cpu.max").partition(" ")
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return unlimited
    return -(-int(quota) // int(period))


def _memberships(path: Path) -> list[tuple[str, str]]:
    """(controllers, path) of each line "number:controllers:path"; no controllers is version 2."""
    rows = [line.split(":", 2) for line in _read(path).splitlines()]
    return [(row[1], row[2]) for row in rows if len(row) == 3]  # noqa: PLR2004 - the three fields named above


def _levels(root: Path, path: str) -> list[Path]:
    """From the process's own group up to the root. In a container the path may not exist: then the root is ours."""
    own = root / path.lstrip("/")
    above = [level for level in (own, *own.parents) if level == root or root in level.parents]
    return [level for level in above if level.is_dir()]


def _rooms(root: Path, path: str, files: _Files) -> list[MemoryRoom]:
    rooms = (_room(level, files) for level in _levels(root, path))
    return [room for room in rooms if room is not None]


def _room(level: Path, files: _Files) -> MemoryRoom | None:
    limit, usage = _read(level / files.limit), _read(level / files.usage)
    if not limit.isdigit() or not usage.isdigit() or int(limit) >= UNLIMITED_BYTES:
        return None
    used = int(usage) - _row(_read(level / "memory.stat"), files.reclaimable)
    return MemoryRoom(int(limit), max(0, int(limit) - max(0, used)))


def _row(table: str, label: str) -> int:
    """The number behind `label` in a table of "label number" lines; 0 where it is missing."""
    for line in table.splitlines():
        name, _, value = line.partition(" ")
        if name == label and value.isdigit():
            return int(value)
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
