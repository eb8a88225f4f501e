"""What the probe says of this machine, and of containers that we are not in."""

import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from covey.effects import clock, probe
from covey.effects.control_groups import MemoryRoom, core_count, memory_room, processor_count
from covey.effects.probe import Probe


def test_this_machine() -> None:
    seen = Probe(Path("/nowhere/yet")).hardware()
    assert 0 < seen.memory_bytes_available <= seen.memory_bytes_total <= psutil.virtual_memory().total
    assert 1 <= seen.physical_cores <= seen.logical_cores
    assert 0 < seen.disk_bytes_available <= seen.disk_bytes_total
    assert seen.os_name
    assert seen.processor
    assert "127.0.0.1" in dict(reversed(pair) for pair in seen.interfaces)
    assert dict(seen.interfaces).keys() >= {probe.loopback_interface()}


def test_a_process_that_has_ended_holds_nothing() -> None:
    """Neither one that nobody has reaped yet, nor one that is gone."""
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert Probe.resident_bytes((os.getpid(), ended.pid)).keys() == {os.getpid()}
    ended.wait()
    assert Probe.resident_bytes((ended.pid,)) == {}


def test_a_machine_keeps_its_id_and_tells_nothing_else() -> None:
    first, second = probe.machine_id(), probe.machine_id()
    assert first == second
    secret = Path("/etc/machine-id")
    assert not secret.exists() or secret.read_text().strip() not in first


def test_a_look_is_cheap() -> None:
    looker = Probe(Path("/"))
    looker.hardware()
    start = time.process_time()
    for _ in range(10):
        looker.hardware()
    assert (time.process_time() - start) / 10 < 0.02  # every 5 s: under half a percent of a core


def membership(tmp_path: Path, line: str) -> Path:
    path = tmp_path / "membership"
    path.write_text(line + "\n")
    return path


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content + "\n")


def test_a_container_of_version_2(tmp_path: Path) -> None:
    """The limit sits at the parent of our group; file cache that can be given up counts as free."""
    root = tmp_path / "cgroup"
    group(
        root / "a",
        memory__max="1000",
        memory__current="700",
        memory__stat="anon 1\ninactive_file 300",
        cpu__max="150000 100000",
    )
    group(
        root / "a" / "b",
        memory__max="max",
        memory__current="600",
        memory__stat="inactive_file 10",
        cpu__max="max 100000",
    )
    inside = membership(tmp_path, "0::/a/b")
    assert memory_room(root, inside) == [MemoryRoom(1000, 600)]
    assert processor_count(root, inside) == min(2, processor_count())


def test_a_container_that_sees_only_its_own_group(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    group(root, memory__max="1000", memory__current="1700", memory__stat="", cpu__max="1000 100000")
    assert memory_room(root, membership(tmp_path, "0::/not/mounted/here")) == [MemoryRoom(1000, 0)]
    assert processor_count(root, membership(tmp_path, "0::/")) == 1


def test_a_container_of_version_1(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    group(root / "memory", memory__limit_in_bytes=str(2**63 - 4096), memory__usage_in_bytes="5")
    group(
        root / "memory" / "a",
        memory__limit_in_bytes="2000",
        memory__usage_in_bytes="500",
        memory__stat="total_inactive_file 100",
    )
    inside = membership(tmp_path, "7:cpu,cpuacct:/\n4:memory:/a")
    assert memory_room(root, inside) == [MemoryRoom(2000, 1600)]


@pytest.mark.parametrize("line", ["", "nonsense", "0::/"])
def test_no_limits(tmp_path: Path, line: str) -> None:
    assert memory_room(tmp_path / "cgroup", membership(tmp_path, line)) == []


def test_the_clock_goes_forward_in_milliseconds() -> None:
    start = clock.now_ms()
    time.sleep(0.02)
    assert 15 <= clock.now_ms() - start < 1000


def test_threads_of_one_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is kept to four processors of a large machine may have two cores of it."""
    for number, siblings in enumerate(("0,4", "1,5", "2,6", "3,7") * 2):
        group(tmp_path / f"cpu{number}" / "topology", thread_siblings_list=siblings + "\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5})
    none = membership(tmp_path, "0::/")
    assert (core_count(tmp_path, none, tmp_path), processor_count(tmp_path, none)) == (2, 4)
    group(tmp_path, **{"cpu.max": "100000 100000"})
    assert core_count(tmp_path, none, tmp_path) == 1
    (tmp_path / "cpu.max").unlink()
    assert 1 <= core_count(tmp_path, none, tmp_path / "nothing is said there") <= 4
