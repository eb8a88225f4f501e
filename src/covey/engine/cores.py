"""Which of a machine's cores a runner computes on, where several of its runners compute at the same time.

A runner alone has all cores. Of two that compute at once each keeps to its own half: else threads of one wait in the
middle of a step for another of theirs whose core the other runner has. Stages that wait for one another don't compute
at once: no two of them compute more than half of the time each.

Nobody decides for others: each runner that is busy leaves a mark for all to see, and all come to the same parts
(docs/decisions/0011-sharing-cores.md).
"""

import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

MARKS: Final = Path("/dev/shm")  # noqa: S108 - memory, on Linux; the marks are empty files
PREFIX: Final = "covey-cores-"
PROCESSORS: Final = Path("/sys/devices/system/cpu")
LOOK_SECONDS: Final = 0.5  # between two looks of a runner that computes
BUSY_FROM: Final = 0.7  # of the time between two looks that it was in steps
BUSY_TO: Final = 0.55  # more than one half, which is the most that two can have that wait for one another
MARK_SECONDS_MAX: Final = 10.0  # that a mark counts; a step may take seconds
FORGOTTEN_SECONDS: Final = 60.0  # after which the mark of a runner that was killed is removed

log = logging.getLogger(__name__)

Core = tuple[int, ...]  # the logical processors of one


def cores_of(processors: Sequence[int], folder: Path = PROCESSORS) -> list[Core]:
    """The physical cores of these logical processors, in order, with those of each that are named.

    Empty where the system does not tell (it is not Linux).
    """
    found: dict[str, list[int]] = {}
    for number in sorted(processors):
        with suppress(OSError):
            siblings = (folder / f"cpu{number}" / "topology" / "thread_siblings_list").read_text().strip()
            found.setdefault(siblings, []).append(number)
    return [tuple(each) for each in found.values()]


def part(cores: Sequence[Core], names: Sequence[str], own: str) -> list[Core]:
    """The cores of `own` among these that compute at once: as many for each, and what is left over for all of them."""
    size = len(cores) // len(names)
    start = sorted(names).index(own) * size
    return [*cores[start : start + size], *cores[len(names) * size :]]


class Load:
    """Whether a runner computes most of the time. Pure."""

    def __init__(self) -> None:
        self.is_busy = False
        self._looked_s = self._computed_s = 0.0

    def is_due(self, now_s: float) -> bool:
        return now_s - self._looked_s >= LOOK_SECONDS

    def look(self, now_s: float, computed_s: float) -> float:
        """`computed_s`: ever. Returns for how many seconds what it finds is to count."""
        span_s, computed_since_s = now_s - self._looked_s, computed_s - self._computed_s
        self.is_busy = computed_since_s >= span_s * (BUSY_TO if self.is_busy else BUSY_FROM)
        self._looked_s, self._computed_s = now_s, computed_s
        return min(2 * span_s, MARK_SECONDS_MAX)


class Cores:
    """What this process has of those that it may run on. Linux alone has both marks and a way to keep to cores."""

    def __init__(self, marks: Path = MARKS) -> None:
        """`marks`: a folder in memory that all runners of this user see."""
        allowed = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
        self._cores = cores_of(allowed)
        self._kept = self._cores
        self._marks = marks
        # Runners that are kept to other processors from the first have nothing to share with this one.
        self._family = f"{PREFIX}{os.getuid()}-{sum(1 << number for number in allowed):x}-"
        self._name = f"{self._family}{secrets.token_hex(4)}"
        self._load = Load()
        self._computed_s = 0.0

    @contextmanager
    def computing(self) -> Generator[None]:
        """For the main thread, around each step."""
        began_s = time.monotonic()
        if len(self._cores) > 1 and self._load.is_due(began_s):
            self._look(began_s)
        yield
        self._computed_s += time.monotonic() - began_s

    def leave(self) -> None:
        """The others have all cores again, and so has this process."""
        with suppress(OSError):  # it is forgotten by itself
            (self._marks / self._name).unlink(missing_ok=True)
        self._keep_to(self._cores)

    def _look(self, now_s: float) -> None:
        seconds = self._load.look(now_s, self._computed_s)
        names = self._meet(seconds) if self._load.is_busy else [self._name]
        self._keep_to(part(self._cores, names, self._name))

    def _meet(self, seconds: float) -> list[str]:
        """Leaves a mark that counts for so long, and returns all names that count now, its own among them."""
        now_s = time.time()
        try:
            self._mark(now_s + seconds)
            others = [path.name for path in self._marks.glob(f"{self._family}*") if _counts(path, now_s)]
        except OSError as error:
            log.debug("who else computes is not known: %s", error)
            others = []
        return sorted({self._name, *others})

    def _mark(self, until_s: float) -> None:
        path = self._marks / self._name
        path.touch(0o600)
        os.utime(path, (until_s, until_s))

    def _keep_to(self, cores: list[Core]) -> None:
        """All threads; those that begin later are kept to the same as the one that starts them."""
        if cores == self._kept or sys.platform != "linux":
            return
        self._kept = cores
        processors = [number for core in cores for number in core]
        ours = {thread.native_id for thread in threading.enumerate()}
        for thread in (int(path.name) for path in Path("/proc/self/task").iterdir()):
            try:
                os.sched_setaffinity(thread, processors)
                if thread not in ours:
                    _give_way(thread, wanted=cores != self._cores)
            except ProcessLookupError:  # it has ended meanwhile
                continue
            except OSError as error:
                log.warning("a thread can't be kept to the processors %s: %s", processors, error)


def _give_way(thread: int, *, wanted: bool) -> None:
    """Whether a thread that a library has started to help the main one waits for a core that is free, or for the end of
    another thread's time slice (sched(7), SCHED_BATCH).

    There are as many of them as cores in all. On a part of those each would take the main one's core in the middle of
    work that it can do as well by itself.
    """
    if sys.platform == "linux" and os.sched_getscheduler(thread) in {os.SCHED_OTHER, os.SCHED_BATCH}:
        os.sched_setscheduler(thread, os.SCHED_BATCH if wanted else os.SCHED_OTHER, os.sched_param(0))


def _counts(path: Path, now_s: float) -> bool:
    """Whether the runner of this mark is busy now. What is long over is removed."""
    try:
        found = path.lstat()
        if now_s - found.st_mtime > FORGOTTEN_SECONDS and found.st_uid == os.getuid():
            path.unlink()
    except OSError as error:  # it has gone meanwhile
        log.debug("%s is left: %s", path, error)
        return False
    return found.st_uid == os.getuid() and 0 < found.st_mtime - now_s <= MARK_SECONDS_MAX
