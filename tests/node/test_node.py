"""Whole nodes on this machine, seen from outside: as people, clients and a passing accident see them."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from nodes import NodeProcess, cluster_name, running, until
from tiny_model import write_model

from covey.node import NodeOptions, run_node

TOGETHER_S_MAX = AWAY_S_MAX = 3.0
GONE_S_MAX = 2.0  # of a node that says goodbye: it takes some 10 ms, and to be away takes 2.5 s


def place(node: NodeProcess, model: Path, nodes: int) -> None:
    node.post("/place_instance", {"model_id": str(model), "min_nodes": nodes})
    until(lambda: list(node.runners().values()) == ["Ready"] * nodes)


@pytest.mark.timed
def test_two_nodes_from_start_to_end(tmp_path: Path) -> None:
    """They find each other, serve a model that is split over both, one dies, and the other leaves in order."""
    model = write_model(tmp_path / "model.gguf", layers=4)
    with running(tmp_path, "a", "b") as (a, b):
        both = {"a": "visible", "b": "visible"}
        took_s = until(lambda: a.visibility() == both and b.visibility() == both)
        print(f"found each other in {took_s:.2f} s")
        assert took_s < TOGETHER_S_MAX

        place(a, model, 2)
        (instance,) = a.get("/cluster")["instances"]
        assert {stage["node_id"] for stage in instance["stages"]} == {a.node_id, b.node_id}
        answers = {node.ask(str(model), "Where is it?", max_tokens=12) for node in (a, b) for _ in range(2)}
        assert len(answers) == 1
        assert answers != {""}

        orphans = b.children()
        assert len(orphans) == 2  # a runner and the mesh process
        b.process.kill()
        took_s = until(lambda: a.visibility() == {"a": "visible", "b": "away"}, 20)
        print(f"shown as away after {took_s:.2f} s")
        assert took_s < AWAY_S_MAX
        assert psutil.wait_procs(orphans, timeout=10)[1] == []  # neither outlives its node

        left = a.children()
        assert a.leave() == 0
        assert psutil.wait_procs(left, timeout=1)[1] == []
        assert "Traceback" not in a.errors() + b.errors()


@pytest.mark.timed
def test_a_node_that_leaves_is_gone_at_once(tmp_path: Path) -> None:
    with running(tmp_path, "a", "b", "c") as nodes:
        until(lambda: all(len(node.visibility()) == len(nodes) for node in nodes))
        until(lambda: all(node.get("/cluster")["leader"] for node in nodes))
        [leader] = [node for node in nodes if node.get("/cluster")["leader"] == node.node_id]
        others = [node for node in nodes if node is not leader]
        leader.process.send_signal(signal.SIGTERM)
        took_s = until(lambda: all(set(node.visibility()) == {other.name for other in others} for node in others))
        took_s += until(lambda: all(node.get("/cluster")["leader"] for node in others))
        print(f"gone, and followed by another, after {took_s:.2f} s")
        assert took_s < GONE_S_MAX


def test_what_fails_at_the_start_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(tmp_path, "a") as (a,):
        port = int(a.url.rpartition(":")[2])
        busy, free, new = tmp_path / "a", tmp_path / "b", tmp_path / "c"
        for options, sentence in [
            (NodeOptions(data_dir=busy), f"the data folder {busy} is in use by process {a.process.pid}; stop "),
            (NodeOptions(data_dir=new, port=port), f"port {port} of 127.0.0.1 is in use; end "),
            (NodeOptions(data_dir=free, host="192.0.2.77"), "192.0.2.77 is no address of this machine; name "),
            (NodeOptions(data_dir=free, port=0, peers=("host:",)), "'host:' is not the address of a peer; write "),
        ]:
            assert run_node(options, lambda _: pytest.fail("it is not ready")) == 1
            output, errors = capsys.readouterr()
            assert errors.startswith(f"covey: {sentence}")
            assert errors.count("\n") == 1
            assert output == ""
        assert not new.exists(), "a start that was refused leaves no identity behind"


def test_ctrl_c_ends_a_node_in_the_middle_of_an_answer(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", layers=4)
    with running(tmp_path, "a") as (a,):
        place(a, model, 1)
        body = {"model": str(model), "messages": [{"role": "user", "content": "?"}], "stream": True, "seed": 1}
        lines: list[str] = []

        def listen() -> None:
            with httpx.stream("POST", f"{a.url}/v1/chat/completions", json=body, timeout=60) as response:
                try:
                    lines.extend(response.iter_lines())
                except httpx.RemoteProtocolError:
                    lines.append("broken")

        def watch() -> None:
            with httpx.stream("GET", f"{a.url}/cluster/stream", timeout=60) as response:
                try:
                    for _ in response.iter_lines():
                        pass
                except httpx.RemoteProtocolError:
                    pass

        clients = [threading.Thread(target=listen), threading.Thread(target=watch)]
        for client in clients:
            client.start()
        until(lambda: "Running" in a.runners().values())
        children, start = a.children(), time.monotonic()
        assert a.leave(signal.SIGINT) == 0
        print(f"left in {time.monotonic() - start:.2f} s")
        for client in clients:
            client.join(20)
        assert psutil.wait_procs(children, timeout=1)[1] == []
        assert a.errors() == ""
        assert any("error" in json.loads(line[6:]) for line in lines if line.startswith("data: {"))  # no silent end


@pytest.mark.timed
def test_a_node_that_comes_back_is_the_same(tmp_path: Path) -> None:
    cluster = cluster_name()
    with running(tmp_path, "a", "b", cluster=cluster) as (a, b):
        until(lambda: len(a.visibility()) == 2)
        b.process.kill()
        b.process.wait()
        with running(tmp_path, "b", cluster=cluster) as (again,):
            assert again.node_id == b.node_id
            took_s = until(lambda: a.visibility() == again.visibility() == {"a": "visible", "b": "visible"})
            assert took_s < TOGETHER_S_MAX
            assert len(a.get("/cluster")["members"]) == 2


def test_after_a_power_cut_everything_serves_again_without_a_person(tmp_path: Path) -> None:
    """All nodes at once, killed without a word; and one that comes back serves what it held alone."""
    model = write_model(tmp_path / "model.gguf", layers=4)
    cluster = cluster_name()
    with running(tmp_path, "a", "b", cluster=cluster) as (a, b):
        until(lambda: a.visibility() == b.visibility() == {"a": "visible", "b": "visible"})
        place(a, model, 2)
        placed = a.post("/place_instance", {"model_id": str(model), "node_ids": [b.node_id]})
        assert placed["on_one_node_only"] is False
        until(lambda: list(b.runners().values()) == ["Ready"] * 3)
        (answer,) = {a.ask(str(model), "Where is it?", max_tokens=12) for _ in range(2)}
        orphans = a.children() + b.children()
        for node in (a, b):
            node.process.kill()
            node.process.wait()
        assert psutil.wait_procs(orphans, timeout=10)[1] == []
    with running(tmp_path, "a", "b", cluster=cluster) as (a, b):
        took_s = until(lambda: sorted(a.runners().values()) == sorted(b.runners().values()) == ["Ready"] * 3)
        print(f"serves again {took_s:.2f} s after the nodes listen")
        assert a.ask(str(model), "Where is it?", max_tokens=12) == answer
        assert b.ask(str(model), "Where is it?", max_tokens=12) == answer
        a.delete(f"/instance/{placed['instance_id']}")
        until(lambda: list(b.runners().values()) == ["Ready"] * 2)
        b.process.kill()
        b.process.wait()
        with running(tmp_path, "b", cluster=cluster) as (again,):
            until(lambda: list(again.runners().values()) == ["Ready"] * 2)  # what was deleted stays so
            assert again.ask(str(model), "Where is it?", max_tokens=12) == answer
        assert "Traceback" not in a.errors() + b.errors()


def test_a_damaged_store_stops_no_node_and_the_other_gives_back_what_it_held(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", layers=4)
    cluster = cluster_name()
    with running(tmp_path, "a", "b", cluster=cluster) as (a, b):
        until(lambda: len(a.visibility()) == 2)
        place(a, model, 2)
        b.process.kill()
        b.process.wait()
        for part in (tmp_path / "b").rglob("intent.sqlite*"):
            part.write_bytes(b"not a database " * 1_000)
        with running(tmp_path, "b", cluster=cluster) as (again,):
            until(lambda: len(again.visibility()) == 2 and set(again.runners().values()) == {"Ready"})
            assert len(again.get("/cluster")["wishes"]) == 1
            assert again.errors().count("is damaged") == 1
            assert list((tmp_path / "b").rglob("intent.sqlite.damaged-*Z"))


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with running(tmp_path, "a") as (a,):
        answer = httpx.post(f"{a.url}/place_instance", json={"model_id": str(tmp_path / "missing.gguf")}, timeout=30)
        assert answer.status_code == 404
        assert "There is no file" in answer.json()["error"]["message"]


def test_an_idle_node_writes_nothing_and_hardly_works(tmp_path: Path) -> None:
    """One node was once found to write 34 GB in 15 hours."""
    with running(tmp_path, "a") as (a,):
        until(lambda: len(a.visibility()) == 1)
        time.sleep(1)
        process = psutil.Process(a.process.pid)
        files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        before, start = process.cpu_times(), time.monotonic()
        time.sleep(4)
        after = process.cpu_times()
        share = (after.user + after.system - before.user - before.system) / (time.monotonic() - start)
        print(f"idle: {share:.2%} of a core")
        assert share < 0.03
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files


@pytest.mark.parametrize("is_pipe", [True, False])
def test_a_node_may_end_with_its_input(tmp_path: Path, *, is_pipe: bool) -> None:
    """Whoever started it may be killed, and then can't say goodbye; a null device has ended before it began."""
    command = [sys.executable, "-m", "covey.cli", "up", "--port", "0", "--data-dir", str(tmp_path)]
    command += ["--interface", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, "--until-stdin-closes"],
        stdin=subprocess.PIPE if is_pipe else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "COVEY_HOME": str(tmp_path), "COVEY_CLUSTER": cluster_name()},
        text=True,
    )
    try:
        assert process.stdout is not None
        assert "is up" in process.stdout.readline()
        if process.stdin is not None:
            process.stdin.write("words are no end\n")
            process.stdin.flush()
            time.sleep(0.5)
            assert process.poll() is None
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, errors) == (0, "")


@pytest.mark.timed
def test_a_signal_beside_the_end_of_the_input_still_leaves_in_order(tmp_path: Path) -> None:
    """A program that ends its nodes closes their input and sends SIGTERM; only a second signal is impatience."""
    model = write_model(tmp_path / "model.gguf", layers=4)
    with running(tmp_path, "a", ends_with_input=True) as (a,):
        place(a, model, 1)
        [runner] = [each for each in a.children() if "covey.engine" in each.cmdline()]
        runner.suspend()  # so that leaving takes as long as it may
        try:
            assert a.process.stdin is not None
            a.process.stdin.close()
            time.sleep(0.5)
            a.process.send_signal(signal.SIGTERM)
            time.sleep(1)
            assert a.process.poll() is None
            start = time.monotonic()
            assert a.leave() == 0
            assert time.monotonic() - start < 1
        finally:
            with suppress(psutil.NoSuchProcess):
                runner.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_signal_during_the_start_ends_it(tmp_path: Path, number: signal.Signals) -> None:
    node = NodeProcess(tmp_path, "a", cluster_name())
    try:
        time.sleep(0.3)
        assert node.leave(number) in {0, -number}
    finally:
        node.end()
