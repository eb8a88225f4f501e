"""A load that hangs, with the real engine: the process is gone in time, its memory is back, and the model serves.

`tests/node/test_hangs.py` has the same with the fake engine, which takes no memory.
"""

import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import accidents
import census
import psutil
import pytest
from nodes import NodeProcess, cluster_name
from rig import until

LIMIT_S = 3.0
GONE_S_MAX = 5.0  # beside the limit
BACK_BYTES = 20 * census.MIB
BACK_S_MAX = 3.0  # the node reads the file's header anew for the next try, and lets go of it
READY_S_MAX = 90.0


def reports(node: NodeProcess) -> list[dict[str, Any]]:
    [member] = node.get("/cluster")["members"]
    return member["report"]["runners"] if member["report"] else []


def is_at(node: NodeProcess, *states: str) -> bool:
    return [each["state"] for each in reports(node)] in [[state] for state in states]


def place(node: NodeProcess, model: Path) -> None:
    node.post("/place_instance", {"model_id": str(model), "min_nodes": 1, "context_length": 1024})


def take_away(node: NodeProcess) -> None:
    for instance in node.get("/cluster")["instances"]:
        node.delete(f"/instance/{instance['instance_id']}")
    until(lambda: not reports(node), READY_S_MAX, "nothing runs")


def is_runner(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return "covey.engine" in process.cmdline()
    return False  # it has just ended


def runner_of(node: NodeProcess) -> psutil.Process | None:
    return next(filter(is_runner, census.family(node.process.pid)), None)


def held_bytes(node: NodeProcess) -> int:
    """Without the next try, which begins at once where a runner was stopped."""
    return census.resident_bytes(each for each in census.family(node.process.pid) if not is_runner(each))


def stopped(node: NodeProcess) -> psutil.Process:
    """As soon as it has begun to load."""
    until(lambda: is_at(node, "Loading"), READY_S_MAX, "it loads")
    runner = runner_of(node)
    assert runner is not None
    runner.send_signal(signal.SIGSTOP)
    return runner


def hanging(node: NodeProcess) -> psutil.Process:
    """Once it waits for its disk."""

    def holds_much() -> bool:
        runner = runner_of(node)
        return runner is not None and is_at(node, "Loading") and census.resident_bytes([runner]) > 200 * census.MIB

    until(holds_much, READY_S_MAX, "it hangs")
    runner = runner_of(node)
    assert runner is not None
    return runner


@pytest.mark.timed
@pytest.mark.parametrize(
    "is_stopped",
    [pytest.param(True, id="it is stopped"), pytest.param(False, id="its disk hangs", marks=pytest.mark.faults)],
)
def test_a_load_that_hangs_gives_its_memory_back(
    tmp_path: Path,
    demo_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_stopped: bool,  # noqa: FBT001
) -> None:
    monkeypatch.setenv("COVEY_LOAD_TIMEOUT_S", str(LIMIT_S))
    wrong = accidents.prepared(tmp_path / "accidents", monkeypatch)
    node = NodeProcess(tmp_path, "a", cluster_name(), engine="onnx")
    try:
        node.wait_listening()
        place(node, demo_model)
        until(lambda: is_at(node, "Ready"), READY_S_MAX, "it serves")
        take_away(node)
        assert runner_of(node) is None
        before_bytes = held_bytes(node)

        if not is_stopped:
            wrong.begin("disk-hangs")
        place(node, demo_model)
        runner = stopped(node) if is_stopped else hanging(node)
        hung_s = time.monotonic()
        if not is_stopped:
            wrong.end("disk-hangs")
        until(lambda: not runner.is_running(), READY_S_MAX, "it is gone")
        took_s = time.monotonic() - hung_s
        assert took_s < LIMIT_S + GONE_S_MAX

        def more_bytes() -> int:
            return held_bytes(node) - before_bytes

        until(lambda: more_bytes() < BACK_BYTES, BACK_S_MAX, "its memory is back", more_bytes)
        print(f"gone after {took_s:.1f} s of {LIMIT_S:g} s, {more_bytes() / census.MIB:+.1f} MiB")
        until(lambda: "COVEY_LOAD_TIMEOUT_S" in reports(node)[0]["reason"], 10, "it says why", lambda: reports(node))
        until(lambda: is_at(node, "Ready"), READY_S_MAX, "the next try serves", lambda: reports(node))
        print(f"ready again after {time.monotonic() - hung_s:.1f} s")
        take_away(node)
        until(lambda: runner_of(node) is None, READY_S_MAX, "no process of it is left")
        until(lambda: more_bytes() < BACK_BYTES, BACK_S_MAX, "all memory is back", more_bytes)
        place(node, demo_model)
        until(lambda: is_at(node, "Ready"), READY_S_MAX, "another instance serves", lambda: reports(node))
        assert node.ask(str(demo_model), "Hello", max_tokens=4)
    finally:
        node.end()
