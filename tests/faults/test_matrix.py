"""Each fault that a cluster meets, by real signals, with SmolLM2 over three nodes and four answers under way.

`make faults ROUNDS=20` repeats each; a few of them run once with all tests.
"""

import os
import time
from pathlib import Path

import pytest
from matrix import Fault, Rounds, expect_clean
from questions import Questions
from rig import ASKED, Rig, local
from rows import Row

import census

ROUNDS = int(os.environ.get("FAULTS_ROUNDS", "1"))
STOP_S = float(os.environ.get("FAULTS_STOP_S", "15"))


def kill_runner(stage: int) -> Fault:
    def breaks(rig: Rig, holders: list[str]) -> None:
        rig.runner_of(holders[stage]).kill()

    return Fault(f"SIGKILL of the {('head', 'middle', 'last')[stage]} runner", breaks)


def restart(rig: Rig, name: str) -> None:
    rig.nodes[name].process.wait(20)
    rig.restart(name)


def kill_node(stage: int) -> Fault:
    return Fault(
        f"SIGKILL of the {('', 'middle', 'last')[stage]} runner's node",
        lambda rig, holders: rig.nodes[holders[stage]].process.kill(),
        lambda rig, holders, _: restart(rig, holders[stage]),
    )


def kill_leader(*, holds: bool) -> Fault:
    killed: list[str] = []

    def breaks(rig: Rig, _: list[str]) -> None:
        killed.append(rig.leader())
        assert killed[-1] != ASKED
        rig.nodes[killed[-1]].process.kill()

    return Fault(
        f"SIGKILL of the leader, which holds {'a' if holds else 'no'} shard",
        breaks,
        lambda rig, *_: restart(rig, killed[-1]),
        leader="bea" if holds else "dora",
        leader_holds=holds,
    )


def go_on(rig: Rig, _: list[str], broke_s: float) -> None:
    time.sleep(max(0.0, broke_s + STOP_S - time.monotonic()))
    rig.go_on()


def stop_runner(stage: int) -> Fault:
    def breaks(rig: Rig, holders: list[str]) -> None:
        rig.stop(rig.runner_of(holders[stage]))

    return Fault(f"SIGSTOP of the {('head', 'middle', 'last')[stage]} runner for {STOP_S:g} s", breaks, go_on)


def stop_node(*, alone: bool) -> Fault:
    """`alone`: its runner and its mesh process go on."""

    def breaks(rig: Rig, holders: list[str]) -> None:
        node, *children = census.family(rig.nodes[holders[1]].process.pid)
        rig.stop(node, *([] if alone else children))

    what = "node alone" if alone else "whole machine"
    return Fault(f"SIGSTOP of the middle runner's {what} for {STOP_S:g} s", breaks, go_on)


FAULTS = [
    *map(kill_runner, range(3)),
    *map(kill_node, (1, 2)),
    kill_leader(holds=False),
    kill_leader(holds=True),
    stop_runner(0),
    stop_runner(1),
    stop_node(alone=True),
    stop_node(alone=False),
]
SHORT = {"SIGKILL of the middle runner", "SIGKILL of the last runner's node"}


def cases() -> list[object]:
    marks = {True: (), False: (pytest.mark.faults,)}
    return [pytest.param(fault, id=fault.name.replace(" ", "-"), marks=marks[fault.name in SHORT]) for fault in FAULTS]


@pytest.mark.parametrize("fault", cases())
def test_answers_go_on(tmp_path: Path, demo_model: Path, questions: Questions, rows: list[Row], fault: Fault) -> None:
    with local(tmp_path, demo_model, fault.leader) as rig:
        rounds = Rounds(rig, fault, questions)
        rows.append(rounds.row)
        for number in range(ROUNDS):
            rounds.run(number)
    print(rounds.row)
    expect_clean(rounds.row)
