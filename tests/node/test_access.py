"""A key made at one node opens all of them, until it is revoked at any; and a page in the browser opens none."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
from nodes import NodeProcess, cluster_name, running, until
from tiny_model import write_model

FROM_ELSEWHERE = {"X-Forwarded-For": "192.0.2.7"}  # what a proxy passes on is not from this machine


def visit(node: NodeProcess, **headers: str) -> int:
    return httpx.get(f"{node.url}/node_id", headers={**FROM_ELSEWHERE, **headers}, timeout=30).status_code


def told(node: NodeProcess) -> list[str]:
    return [event["text"] for event in node.get("/events")["events"]]


def test_a_key_is_the_clusters(tmp_path: Path) -> None:
    with running(tmp_path, "a", "b") as (a, b):
        until(lambda: a.visibility() == b.visibility() == {"a": "visible", "b": "visible"})
        made = a.post("/keys", {"name": "laptop"})
        headers = {"Authorization": f"Bearer {made['key']}"}
        took_s = until(lambda: visit(b, **headers) == 200)
        print(f"a key works at the other node after {took_s:.2f} s")
        assert [visit(a, **headers), visit(a), visit(b)] == [200, 401, 401]
        assert httpx.post(f"{b.url}/keys", json={"name": "laptop"}, timeout=30).status_code == 409
        assert httpx.get(f"{b.url}/keys", headers={**FROM_ELSEWHERE, **headers}, timeout=30).status_code == 403

        revoked = httpx.delete(f"{b.url}/keys/laptop", timeout=30)
        assert revoked.json() == {"key_id": made["key_id"]}
        until(lambda: visit(a, **headers) == visit(b, **headers) == 401)

        for node in (a, b):
            until(lambda node=node: any("was revoked" in text for text in told(node)))
            assert {"a joined.", "b joined."} <= set(told(node))
        assert any("Adding the API key 'laptop' was refused" in text for text in told(b))
        secret = made["key"].rpartition("_")[2]
        for path in (*tmp_path.rglob("*"), None):
            text = path.read_bytes() if path and path.is_file() else str([a.get("/cluster"), told(a)]).encode()
            assert secret.encode() not in text


def test_what_is_asked_and_answered_is_in_no_account(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", layers=4)
    with running(tmp_path, "a") as (a,):
        a.post("/place_instance", {"model_id": str(model)})
        until(lambda: list(a.runners().values()) == ["Ready"])
        answer = a.ask(str(model), "A most peculiar question", max_tokens=8)
        until(lambda: any(" is ready as " in text for text in told(a)))
        account = " ".join(told(a))
        assert "peculiar" not in account
        assert answer not in account


def test_a_page_in_the_browser_is_refused(tmp_path: Path) -> None:
    with running(tmp_path, "a") as (a,):
        for headers, status in [
            ({"Host": "rebound.example"}, 421),
            ({"Origin": "https://evil.example"}, 403),
            ({"Origin": a.url}, 200),
            ({"Host": platform_name()}, 200),
        ]:
            assert httpx.get(f"{a.url}/node_id", headers=headers, timeout=30).status_code == status


def platform_name() -> str:
    return socket.gethostname()


COVEY = [sys.executable, "-m", "covey.cli"]


def test_a_node_that_listens_everywhere_starts_without_keys_and_says_how_to_make_one(tmp_path: Path) -> None:
    """The first hour of somebody with a server in the cupboard: `up --host`, `keys add`, and a client elsewhere."""
    environment: dict[str, Any] = {**os.environ, "COVEY_HOME": str(tmp_path), "COVEY_CLUSTER": cluster_name()}
    port = free_port()
    everywhere = "0.0.0.0"  # noqa: S104 - what is tested
    up = [*COVEY, "up", "--host", everywhere, "--port", str(port), "--data-dir", str(tmp_path / "n"), "--log-requests"]
    up += ["--interface", "127.0.0.1"]
    environment["COVEY_URL"] = f"http://127.0.0.1:{port}"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(up, env=environment, stdout=log, stderr=log)
    try:
        until(lambda: " is up (node" in (tmp_path / "log").read_text())
        until(lambda: covey("nodes", environment).returncode == 0)
        assert "`covey keys add NAME`" in (tmp_path / "log").read_text()
        until(lambda: covey("keys add laptop", environment).returncode == 0)
        key = covey("keys add phone", environment).stdout.strip()
        url = f"http://{own_address()}:{port}/node_id"
        assert httpx.get(url, headers=FROM_ELSEWHERE, timeout=30).status_code == 401
        assert httpx.get(url, headers={**FROM_ELSEWHERE, "x-api-key": key}, timeout=30).status_code == 200
        assert httpx.get(url, timeout=30).status_code == 200  # this machine, by its own address
        assert "phone GET /node_id 200" in (tmp_path / "log").read_text()
        assert key not in (tmp_path / "log").read_text()
    finally:
        process.terminate()
        assert process.wait(30) == 0


def covey(arguments: str, environment: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COVEY, *arguments.split()], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def own_address() -> str:
    """An address of this machine that is not the loopback one, if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
