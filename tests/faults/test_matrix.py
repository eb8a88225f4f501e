"""Each fault that a cluster meets, by real signals, with SmolLM2 over three nodes and four answers under way.

`make faults ROUNDS=20` repeats each; one of them runs once with all tests.
"""

from pathlib import Path

import census
import pytest
from matrix import ROUNDS, STOP_S, Fault, repeat
from questions import Questions
from rig import ASKED, Rig, local
from rows import Row


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
        mends=lambda rig, holders: restart(rig, holders[stage]),
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
        mends=lambda rig, _: restart(rig, killed[-1]),
        leader="bea" if holds else "dora",
        leader_holds=holds,
    )


def go_on(rig: Rig, _: list[str]) -> None:
    rig.go_on()


def stop_runner(stage: int) -> Fault:
    def breaks(rig: Rig, holders: list[str]) -> None:
        rig.stop(rig.runner_of(holders[stage]))

    return Fault(f"SIGSTOP of the {('head', 'middle', 'last')[stage]} runner for {STOP_S:g} s", breaks, passes=go_on)


def stop_node(*, alone: bool) -> Fault:
    """`alone`: its runner and its mesh process go on."""

    def breaks(rig: Rig, holders: list[str]) -> None:
        node, *children = census.family(rig.nodes[holders[1]].process.pid)
        rig.stop(node, *([] if alone else children))

    what = "node alone" if alone else "whole machine"
    return Fault(f"SIGSTOP of the middle runner's {what} for {STOP_S:g} s", breaks, passes=go_on)


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


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_answers_go_on(tmp_path: Path, demo_model: Path, questions: Questions, rows: list[Row], fault: Fault) -> None:
    with local(tmp_path, demo_model, fault.leader) as rig:
        repeat(rig, fault, questions, rows, ROUNDS)


def test_answers_go_on_once(tmp_path: Path, demo_model: Path, questions: Questions, rows: list[Row]) -> None:
    """The one that asks for most: a node is noticed to be gone, replaced, and comes back."""
    with local(tmp_path, demo_model, "dora") as rig:
        repeat(rig, kill_node(2), questions, rows, 1)
