"""What no protocol hinders: too little memory after a loss, a runner that can't live, a number of a process that is
somebody else's by now, a clock that jumps.
"""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import accidents
import census
import httpx
import psutil
import pytest
from answers import Answer, long_prompt_of
from memory_groups import MemoryGroup, memory_group
from nodes import NodeProcess, cluster_name, running
from rig import READY_S_MAX, until
from tiny_model import write_model

GIB = 1024 * census.MIB
DEMO_VOCABULARY = "49152"
SOON_S = 15.0
LOST_S = 12.0  # then the work of a silent node is given to others, if they can hold it


def reports(node: NodeProcess) -> list[dict[str, Any]]:
    """Of the runners of nodes that are seen."""
    members = [each for each in node.get("/cluster")["members"] if each["visibility"] == "visible"]
    return [runner for each in members if each["report"] for runner in each["report"]["runners"]]


def states(node: NodeProcess) -> list[str]:
    return sorted(each["state"] for each in reports(node))


def asked(node: NodeProcess, model: Path) -> tuple[int, str]:
    """Status and text of an answer to a short question."""
    body = {"model": str(model), "messages": [{"role": "user", "content": "?"}], "max_tokens": 3}
    answer = httpx.post(f"{node.url}/v1/chat/completions", json=body, timeout=READY_S_MAX)
    return answer.status_code, answer.text


# ---- memory ----


@pytest.fixture
def bereaved(tmp_path: Path, demo_model: Path) -> Generator[tuple[NodeProcess, NodeProcess, MemoryGroup]]:
    """Two machines held a model together, and served. Then one died, and the other is too small: who lives, who died,
    and what the memory of the first is limited by.
    """
    with ExitStack() as held:
        groups = [held.enter_context(memory_group(name, int(1.4 * GIB))) for name in ("small", "other")]
        cluster = cluster_name()
        nodes = [started(held, tmp_path, group, cluster) for group in groups]
        for node in nodes:
            node.wait_listening()
        small, other = nodes
        until(lambda: all(len(node.visibility()) == 2 for node in nodes), READY_S_MAX, "both see both")
        small.post("/place_instance", {"model_id": str(demo_model), "context_length": 8192})
        until(lambda: states(small) == ["Ready"] * 2, READY_S_MAX, "it serves", lambda: reports(small))
        assert asked(small, demo_model)[0] == 200
        other.process.kill()
        until(lambda: small.visibility().get("other") != "visible", SOON_S, "the other is away")
        until(lambda: "waiting" in awaited(small, demo_model), SOON_S, "it waits", lambda: awaited(small, demo_model))
        yield small, other, groups[0]


def awaited(node: NodeProcess, model: Path) -> str:
    """What is said of a model that is not ready."""
    parameters = {"model_id": str(model), "timeout_seconds": 1}
    return httpx.get(f"{node.url}/instance/await", params=parameters, timeout=30).text


@pytest.mark.faults
def test_a_model_that_fits_no_more_after_a_loss_waits_and_comes_back_with_memory(
    demo_model: Path, bereaved: tuple[NodeProcess, NodeProcess, MemoryGroup]
) -> None:
    """Who asks meanwhile is told what is missing."""
    small, _, group = bereaved
    asks = Answer(small, demo_model, "Is there memory?", 3)
    time.sleep(LOST_S)
    assert "Ready" not in states(small)
    assert asks.is_over
    assert re.search(r"\d GB", asks.last["message"]), asks.last
    group.limit(int(3.5 * GIB))
    took_s = until(lambda: states(small) == ["Ready"], READY_S_MAX, "it serves again", lambda: reports(small))
    print(f"ready {took_s:.1f} s after there was memory")
    assert asked(small, demo_model)[0] == 200


@pytest.mark.faults
def test_a_model_that_fits_no_more_after_a_loss_says_what_is_missing(
    demo_model: Path, bereaved: tuple[NodeProcess, NodeProcess, MemoryGroup]
) -> None:
    small, _, _ = bereaved
    time.sleep(LOST_S)
    assert re.search(r"\d GB", awaited(small, demo_model))


def started(held: ExitStack, home: Path, group: MemoryGroup, cluster: str) -> NodeProcess:
    node = NodeProcess(home, group.name, cluster, within=group.command(), vocabulary_size=DEMO_VOCABULARY)
    held.callback(end_all, home, node)
    return node


def end_all(home: Path, node: NodeProcess) -> None:
    children = census.family(node.process.pid)
    node.end()
    for process in children:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(children, timeout=10)


# ---- a runner that can't live ----


@pytest.mark.faults
def test_a_runner_that_always_exits_at_once_fails_with_its_last_words_and_can_be_placed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = accidents.prepared(tmp_path / "accidents", monkeypatch)
    wrong.begin("library-is-missing")
    model = write_model(tmp_path / "model.gguf", layers=4)
    with running(tmp_path, "a") as (a,):
        [instance_id] = [a.post("/place_instance", {"model_id": str(model), "min_nodes": 1})["instance_id"]]

        def has_failed() -> bool:
            return [(each["state"], each["retries_left"]) for each in reports(a)] == [("Failed", 0)]

        took_s = until(has_failed, READY_S_MAX, "it has failed", lambda: reports(a))
        [report] = reports(a)
        print(f"failed for good after {took_s:.1f} s: {report['reason']!r}")
        assert "exit status 3" in report["reason"]
        assert report["reason"].endswith("libcompute.so.1: cannot open shared object file")
        attempt = report["attempt"]
        assert attempt > 1
        status, text = asked(a, model)
        assert status == 503
        assert "libcompute.so.1: cannot open shared object file" in text
        time.sleep(5)
        assert [each["attempt"] for each in reports(a)] == [attempt]

        wrong.end("library-is-missing")
        a.delete(f"/instance/{instance_id}")
        a.post("/place_instance", {"model_id": str(model), "min_nodes": 1})
        until(lambda: states(a) == ["Ready"], READY_S_MAX, "it serves", lambda: reports(a))
        assert asked(a, model)[0] == 200


# ---- what a former life left ----


def test_a_number_of_a_process_that_is_somebody_elses_by_now_harms_nobody(tmp_path: Path) -> None:
    """The power was cut; since then another program has the number that stands in the data folder."""
    cluster = cluster_name()
    with running(tmp_path, "a", cluster=cluster) as (a,):
        node_id = a.node_id
        a.process.kill()
        a.process.wait(20)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as innocent:
        numbers = [path for path in (tmp_path / "a").rglob("*") if path.is_file() and is_number(path)]
        assert tmp_path / "a" / "lock" in numbers
        for path in numbers:
            if path.name != "boot":
                path.write_text(str(innocent.pid))
        with running(tmp_path, "a", cluster=cluster) as (a,):
            assert a.node_id == node_id
            time.sleep(2)
            assert innocent.poll() is None
            assert (tmp_path / "a" / "lock").read_text() == str(a.process.pid)
        innocent.terminate()


def is_number(path: Path) -> bool:
    return path.stat().st_size < 100 and path.read_bytes().strip().isdigit()


@pytest.mark.parametrize("is_stopped", [False, True])
def test_what_a_killed_node_leaves_is_gone_once_it_lives_again(
    tmp_path: Path,
    is_stopped: bool,  # noqa: FBT001
) -> None:
    model = write_model(tmp_path / "model.gguf", layers=4)
    cluster = cluster_name()
    with running(tmp_path, "a", cluster=cluster) as (a,):
        a.post("/place_instance", {"model_id": str(model), "min_nodes": 1})
        until(lambda: states(a) == ["Ready"], READY_S_MAX, "it serves")
        left = a.children()
        try:
            for process in left if is_stopped else []:
                process.send_signal(signal.SIGSTOP)
            a.process.kill()
            a.process.wait(20)
            with running(tmp_path, "a", cluster=cluster) as (again,):
                until(lambda: states(again) == ["Ready"], READY_S_MAX, "it serves again")
                assert psutil.wait_procs(left, timeout=5)[1] == []
        finally:
            for process in left:
                with suppress(psutil.Error):
                    process.kill()


# ---- clocks ----


@pytest.mark.faults
def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A day ahead, a week back, while an answer streams between two nodes: a small board has found the time."""
    wrong = accidents.prepared(tmp_path / "accidents", monkeypatch)
    wrong.begin("clock", "0")
    model = write_model(tmp_path / "model.gguf", layers=4)
    with running(tmp_path, "a", "b") as (a, b):
        until(lambda: len(a.visibility()) == len(b.visibility()) == 2, READY_S_MAX, "both see both")
        a.post("/place_instance", {"model_id": str(model), "min_nodes": 2})
        until(lambda: states(a) == ["Ready"] * 2, READY_S_MAX, "it serves")
        prompt, undisturbed = long_prompt_of(a, model, 200)
        processes = {each.pid for node in (a, b) for each in census.family(node.process.pid)}
        answer = Answer(a, model, prompt, 200)
        for number, jump_s in enumerate((86_400, -7 * 86_400, 0), 1):
            until(lambda number=number: len(answer.token_ids) > 40 * number or answer.is_over, 60, "it goes on")
            wrong.begin("clock", str(jump_s))
        assert answer.wait() == undisturbed
        wrong.begin("clock", str(-7 * 86_400))
        time.sleep(4)  # longer than a node may be silent, and than a sleep is taken for one
        assert set(a.visibility().values()) == set(b.visibility().values()) == {"visible"}
        assert {each.pid for node in (a, b) for each in census.family(node.process.pid)} == processes
        assert asked(b, model)[0] == 200
        (told,) = [each["attempt"] for each in reports(a)[:1]]
        assert told == 1
