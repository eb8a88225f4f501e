"""Cables, slow networks and full disks, as root: hosts are network namespaces, a small disk is a tmpfs."""

import shutil
import subprocess
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from answers import Answer
from lab import missing
from matrix import ROUNDS, STOP_S, Fault, repeat
from questions import Questions
from rig import LabRig, Rig, apart, local
from rows import Row

WHY_NO_NETWORK = missing()
DISK = "8m"
FULL = "bea"  # whose disk it is: with dora in the lead it holds the middle

needs_network = pytest.mark.skipif(bool(WHY_NO_NETWORK), reason=WHY_NO_NETWORK)


def of_lab(action: Callable[[LabRig, list[str]], None]) -> Callable[[Rig, list[str]], None]:
    def act(rig: Rig, holders: list[str]) -> None:
        assert isinstance(rig, LabRig)
        action(rig, holders)

    return act


def cut(stage: int) -> Fault:
    """Not even the end of a connection comes through."""

    def turn(*, is_cut: bool) -> Callable[[Rig, list[str]], None]:
        return of_lab(lambda rig, holders: rig.cut(holders[stage], is_cut=is_cut))

    name = ("", "middle", "last")[stage]
    return Fault(f"the {name} runner's cable is out for {STOP_S:g} s", turn(is_cut=True), passes=turn(is_cut=False))


def slow() -> Fault:
    def set_to(delay_s: float, loss: float) -> Callable[[Rig, list[str]], None]:
        def act(rig: LabRig, _: list[str]) -> None:
            rig.lan.delay_s, rig.lan.loss = delay_s, loss

        return of_lab(act)

    return Fault(
        "20 ms and 2 % loss in the switch",
        set_to(0.02, 0.02),
        mends=set_to(0.0, 0.0),
    )


def netem() -> Fault:
    def each(action: str) -> Callable[[Rig, list[str]], None]:
        def act(rig: LabRig, _: list[str]) -> None:
            for host in rig.hosts.values():
                subprocess.run(host.run("tc", "qdisc", action, "dev", "e0", "root", "netem", *DISTURBED), check=True)

        return of_lab(act)

    return Fault("20 ms and 2 % loss by tc netem", each("add"), mends=each("del"))


DISTURBED = ("delay", "20ms", "5ms", "loss", "2%")


def why_no_netem() -> str:
    if shutil.which("tc") is None:
        return "netem needs tc, of iproute2"
    namespace = "covey-netem-probe"
    if subprocess.run(["ip", "netns", "add", namespace], capture_output=True, check=False).returncode:
        return "network namespaces are not allowed here"
    inside = ("ip", "netns", "exec", namespace, "tc", "qdisc", "add", "dev", "lo", "root", "netem", *DISTURBED)
    done = subprocess.run(inside, capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", namespace], check=True)
    return f"this kernel has no netem: {done.stderr.strip()}" if done.returncode else ""


@needs_network
@pytest.mark.faults
@pytest.mark.parametrize("fault", [cut(1), cut(2), slow()], ids=lambda fault: fault.name.replace(" ", "-"))
def test_answers_go_on(tmp_path: Path, demo_model: Path, questions: Questions, rows: list[Row], fault: Fault) -> None:
    with apart(tmp_path, demo_model, fault.leader) as rig:
        repeat(rig, fault, questions, rows, ROUNDS)


@needs_network
@pytest.mark.faults
def test_answers_go_on_with_netem(tmp_path: Path, demo_model: Path, questions: Questions, rows: list[Row]) -> None:
    reason = why_no_netem()
    if reason:
        pytest.skip(reason)
    with apart(tmp_path, demo_model, "dora") as rig:
        repeat(rig, netem(), questions, rows, ROUNDS)


# ---- disks ----


@contextmanager
def small_disk(folder: Path) -> Generator[None]:
    """What lies in the folder lies on a disk of its own until the block ends."""
    aside = folder.with_name(f"{folder.name}-aside")
    shutil.copytree(folder, aside)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=700", "none", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"a small disk needs root: {done.stderr.strip()}")
    try:
        shutil.copytree(aside, folder, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> None:
    with suppress(OSError), (folder / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    with suppress(OSError), (folder / "filler").open("ab", buffering=0) as filler:
        while True:
            filler.write(b"\0")


def full_disk(*, is_runner_killed: bool) -> Fault:
    """The model is served on, also to who asks only now; a runner that dies is replaced, though its log can't grow."""

    def breaks(rig: Rig, _: list[str]) -> None:
        fill(rig.home / FULL)
        if is_runner_killed:
            rig.runner_of(FULL).kill()

    def mends(rig: Rig, _: list[str]) -> None:
        assert FULL in rig.holders()
        assert len(Answer(rig.asked, rig.model, "Is it full?", 5).wait()) > 0
        assert shutil.disk_usage(rig.home / FULL).free == 0
        (rig.home / FULL / "filler").unlink()

    return Fault("disk full" + (", and the runner there killed" if is_runner_killed else ""), breaks, mends=mends)


@pytest.mark.faults
@pytest.mark.parametrize("is_runner_killed", [False, True])
def test_answers_go_on_while_a_disk_is_full(
    tmp_path: Path,
    demo_model: Path,
    questions: Questions,
    rows: list[Row],
    is_runner_killed: bool,  # noqa: FBT001
) -> None:
    with local(tmp_path, demo_model, "dora", lambda: small_disk(tmp_path / FULL)) as rig:
        repeat(rig, full_disk(is_runner_killed=is_runner_killed), questions, rows, ROUNDS)
