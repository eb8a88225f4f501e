"""The third field report: a load that hangs held its memory until the machine was restarted. Here it ends, in time."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from nodes import NodeProcess, running, until
from tiny_model import write_model

from covey.node import NodeOptions, run_node

LIMIT_S = 3.0
GONE_S_MAX = 5.0  # beside the limit
LAYERS = 4


def report(node: NodeProcess) -> dict[str, Any]:
    [member] = node.get("/cluster")["members"]
    runners = member["report"]["runners"] if member["report"] else []
    return runners[0] if runners else {"state": "", "attempt": 0, "reason": ""}


def runner_process(node: NodeProcess) -> psutil.Process:
    [found] = [each for each in node.children() if "covey.engine" in each.cmdline()]
    return found


def is_at(node: NodeProcess, state: str, attempt: int) -> bool:
    found = report(node)
    return (found["state"], found["attempt"]) == (state, attempt)


def stop_for_good(process: psutil.Process) -> float:
    """As a driver or a deadlock would: it lives, and does nothing more. When, by the clock that we measure with."""
    process.send_signal(signal.SIGSTOP)
    return time.monotonic()


def serve_once(node: NodeProcess, model: Path) -> None:
    """What a node reads into its memory for its first model is not the hang's."""
    node.post("/place_instance", {"model_id": str(model), "min_nodes": 1})
    until(lambda: is_at(node, "Ready", 1))
    [instance] = node.get("/cluster")["instances"]
    node.delete(f"/instance/{instance['instance_id']}")
    until(lambda: report(node)["state"] == "")


def held_bytes(node: NodeProcess) -> int:
    ours = [psutil.Process(node.process.pid), *node.children()]
    return sum(each.memory_info().rss for each in ours)


@pytest.mark.timed
def test_a_load_that_hangs_ends_in_time_and_the_next_try_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COVEY_LOAD_TIMEOUT_S", str(LIMIT_S))
    model = write_model(tmp_path / "model.gguf", layers=LAYERS)
    with running(tmp_path, "a", load_delay_ms="800") as (a,):
        serve_once(a, model)
        before_bytes = held_bytes(a)
        a.post("/place_instance", {"model_id": str(model), "min_nodes": 1})
        until(lambda: is_at(a, "Loading", 1) and report(a)["layers_loaded"] > 0)
        hanging = runner_process(a)
        stopped_at = stop_for_good(hanging)
        until(lambda: not hanging.is_running())
        took_s = time.monotonic() - stopped_at
        print(f"gone {took_s:.2f} s after it was stopped, with a limit of {LIMIT_S} s")
        assert LIMIT_S - 1 < took_s < LIMIT_S + GONE_S_MAX
        assert held_bytes(a) - before_bytes < 20 * 1024 * 1024
        until(lambda: report(a)["reason"] != "")
        reason = report(a)["reason"]
        assert reason.startswith("loading came no further than ")
        assert (
            f"of {LAYERS} layers for 3 s (COVEY_LOAD_TIMEOUT_S allows more); its process was ended: signal 9" in reason
        )
        until(lambda: is_at(a, "Ready", 2))
        print(f"ready again {time.monotonic() - stopped_at:.2f} s after it was stopped")
        assert a.ask(str(model), "Where is it?", max_tokens=4)
        assert report(a)["reason"] == ""


@pytest.mark.timed
@pytest.mark.parametrize("is_answering", [True, False])
def test_a_runner_that_is_stopped_is_replaced_whether_it_answers_or_not(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_answering: bool,  # noqa: FBT001
) -> None:
    """Its node sees that a signal holds it, before a beat is missed."""
    model = write_model(tmp_path / "model.gguf", layers=LAYERS)
    with running(tmp_path, "a") as (a,):
        a.post("/place_instance", {"model_id": str(model), "min_nodes": 1})
        until(lambda: is_at(a, "Ready", 1))
        hanging = runner_process(a)
        if is_answering:
            answering = a.stream(str(model))
            until(lambda: is_at(a, "Running", 1))
        stopped_at = stop_for_good(hanging)
        until(lambda: not hanging.is_running())
        took_s = time.monotonic() - stopped_at
        print(f"gone {took_s:.2f} s after it was stopped")
        assert took_s < 1.5 + GONE_S_MAX
        until(lambda: is_at(a, "Ready", 2))
        assert a.ask(str(model), "Where is it?", max_tokens=4)
        if is_answering:
            answering.join(20)
            assert not answering.is_alive()


def test_a_slow_load_and_a_long_idleness_are_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COVEY_LOAD_TIMEOUT_S", "2")
    monkeypatch.setenv("COVEY_STEP_TIMEOUT_S", "1")
    model = write_model(tmp_path / "model.gguf", layers=LAYERS)
    with running(tmp_path, "a", load_delay_ms="1200") as (a,):
        a.post("/place_instance", {"model_id": str(model), "min_nodes": 1})
        until(lambda: is_at(a, "Ready", 1))
        process = runner_process(a)
        time.sleep(9)  # longer than it may be silent
        assert is_at(a, "Ready", 1)
        assert process.is_running()


def test_a_node_that_was_stopped_itself_takes_nobody_for_hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after the sleep of a laptop: what its runner said meanwhile is read late, or it slept as well."""
    monkeypatch.setenv("COVEY_STEP_TIMEOUT_S", "1")
    model = write_model(tmp_path / "model.gguf", layers=LAYERS)
    with running(tmp_path, "a") as (a,):
        a.post("/place_instance", {"model_id": str(model), "min_nodes": 1})
        until(lambda: is_at(a, "Ready", 1))
        process = runner_process(a)
        for each in (a.process.pid, process.pid):
            os.kill(each, signal.SIGSTOP)
        time.sleep(8)
        for each in (a.process.pid, process.pid):
            os.kill(each, signal.SIGCONT)
        time.sleep(3)
        assert is_at(a, "Ready", 1)
        assert process.is_running()


def test_a_limit_that_is_no_time_is_one_sentence_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COVEY_LOAD_TIMEOUT_S", "ten minutes")
    assert run_node(NodeOptions(data_dir=tmp_path, port=0), lambda _: pytest.fail("it is not ready")) == 1
    sentence = (
        "COVEY_LOAD_TIMEOUT_S is 'ten minutes', which is no number of seconds from 1 to 86400; correct it, or unset it"
    )
    assert capsys.readouterr().err == f"covey: {sentence}\n"
