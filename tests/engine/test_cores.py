"""Two models on one machine are asked at once: each runner keeps to its own cores, and has all of them when alone."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from covey.engine.cores import LOOK_SECONDS, MARK_SECONDS_MAX, Cores, Load, cores_of, part

FOUR = [(0, 4), (1, 5), (2, 6), (3, 7)]
RUNNER = """
import _thread, json, os, sys, time
from pathlib import Path
from covey.engine.cores import Cores
lock = _thread.allocate_lock()
lock.acquire()
helper = _thread.start_new_thread(lock.acquire, ())  # as a library's: Python's module `threading` knows nothing of it
cores, told = Cores(Path(sys.argv[1])), None
while True:
    with cores.computing():
        time.sleep(0.02)
    threads = [int(name) for name in os.listdir("/proc/self/task") if int(name) != os.getpid()]
    [helper] = threads
    state = [sorted(os.sched_getaffinity(each)) for each in (0, helper)], os.sched_getscheduler(helper)
    if state != told:
        print(json.dumps(state), flush=True)
        told = state
"""
needs_cores = pytest.mark.skipif(
    sys.platform != "linux" or len(cores_of(sorted(os.sched_getaffinity(0)))) < 2, reason="there is one core to see"
)


def processors(cores: list[tuple[int, ...]]) -> list[int]:
    return [number for core in cores for number in core]


def test_who_computes_alone_has_all_cores() -> None:
    assert part(FOUR, ["a"], "a") == FOUR


@pytest.mark.parametrize("count", range(2, 7))
def test_all_have_as_many_cores_of_their_own_and_share_what_is_left_over(count: int) -> None:
    names = [f"runner {number}" for number in range(count)]
    parts = [part(FOUR, names[::-1], name) for name in names]
    assert len({len(each) for each in parts}) == 1
    shared = set(parts[0]).intersection(*parts)
    assert len(shared) == len(FOUR) % count if count <= len(FOUR) else shared == set(FOUR)
    own = [set(each) - shared for each in parts]
    assert sum(map(len, own)) + len(shared) == len(FOUR)
    assert set().union(*own, shared) == set(FOUR)


def test_threads_of_one_core_stay_together(tmp_path: Path) -> None:
    for number, siblings in enumerate(("0,2", "1,3") * 2):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    assert cores_of([0, 1, 2, 3], tmp_path) == [(0, 2), (1, 3)]
    assert cores_of([3, 2, 0], tmp_path) == [(0, 2), (3,)]
    assert cores_of([0], tmp_path / "nothing is said there") == []


def busy_after(shares: list[float], load: Load) -> list[bool]:
    """What each of as many looks finds."""
    found, now_s, computed_s = list[bool](), 1000.0, 0.0
    load.look(now_s, computed_s)
    for share in shares:
        now_s, computed_s = now_s + LOOK_SECONDS, computed_s + share * LOOK_SECONDS
        load.look(now_s, computed_s)
        found.append(load.is_busy)
    return found


def test_stages_that_wait_for_one_another_are_not_both_busy() -> None:
    """After a prompt, which both have computed at once, one is idle while the other computes."""
    for first in (0.1, 0.3, 0.5, 0.7, 0.9):
        both = [busy_after([1.0, share, share], Load())[-1] for share in (first, 1 - first)]
        assert not all(both), first


def test_one_look_of_a_little_less_changes_nothing() -> None:
    assert busy_after([0.6, 0.9, 0.6, 0.9, 0.5, 0.6], Load()) == [False, True, True, True, False, False]


def test_a_runner_that_was_idle_is_not_busy_and_one_that_takes_long_is_seen_for_long() -> None:
    load = Load()
    load.look(1000.0, 5.0)
    assert not load.is_due(1000.0 + LOOK_SECONDS / 2)
    assert load.look(1003.0, 8.0) == 6.0
    assert load.is_busy
    assert load.look(2000.0, 9.0) == MARK_SECONDS_MAX
    assert not load.is_busy


@contextmanager
def runner(marks: Path) -> Generator[Callable[[], Any]]:
    """Another process that computes without a pause. Yields what reads the next state that it tells."""
    with subprocess.Popen([sys.executable, "-c", RUNNER, str(marks)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield lambda: json.loads(process.stdout.readline())  # type: ignore[union-attr]
        process.kill()


@needs_cores
def test_two_that_compute_keep_to_their_own_cores_until_one_is_killed(tmp_path: Path) -> None:
    every = sorted(os.sched_getaffinity(0))
    policy = os.sched_getscheduler(0)
    with runner(tmp_path) as first:
        assert first() == [[every, every], policy]
        with runner(tmp_path) as second:
            assert second() == [[every, every], policy]
            states = [first(), second()]
        assert first() == [[every, every], policy]
    kept = [set(state[0][0]) for state in states]
    assert all(state[0][0] == state[0][1] for state in states), "all threads are"
    assert not kept[0] & kept[1] or len(cores_of(every)) % 2
    assert kept[0] != kept[1]
    gives_way = os.SCHED_BATCH if policy == os.SCHED_OTHER else policy
    assert [state[1] for state in states] == [gives_way] * 2


@needs_cores
def test_marks_that_are_over_or_somebody_elses_count_for_nothing(tmp_path: Path) -> None:
    every = os.sched_getaffinity(0)
    cores = Cores(tmp_path)

    def compute() -> None:
        end = time.monotonic() + 2.5 * LOOK_SECONDS
        while time.monotonic() < end:
            with cores.computing():
                time.sleep(0.02)

    compute()
    [mark] = tmp_path.iterdir()
    family = mark.name.rpartition("-")[0]
    old, other = tmp_path / f"{family}-killed", tmp_path / "covey-cores-0-f0f0-elsewhere"
    for path, after_s in ((old, -100.0), (other, 5.0), (tmp_path / f"{family}-tomorrow", 90_000.0)):
        path.touch()
        until_s = time.time() + after_s
        os.utime(path, (until_s, until_s))
    compute()
    assert os.sched_getaffinity(0) == every
    assert not old.exists()
    cores.leave()
    assert not mark.exists()


@needs_cores
def test_where_no_marks_can_be_left_a_runner_has_all_cores(tmp_path: Path) -> None:
    every, cores = os.sched_getaffinity(0), Cores(tmp_path / "is not there")
    end = time.monotonic() + 2.5 * LOOK_SECONDS
    while time.monotonic() < end:
        with cores.computing():
            time.sleep(0.02)
        assert os.sched_getaffinity(0) == every
    cores.leave()
    assert not list(tmp_path.iterdir())
