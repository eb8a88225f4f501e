"""A device is lost. Somebody changes the join code at another: those who stay meet again, the lost one stays out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
from nodes import NodeProcess, cluster_name, until
from tiny_model import write_model

from covey.effects.code_file import kept_code, replace_code
from tests.credentials import CODE

NAMES = ("anna", "berta", "lost")


def covey(home: Path, cluster: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"COVEY_HOME": str(home), "COVEY_CLUSTER": cluster, "COLUMNS": "200", "PATH": ""}
    environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    command = [sys.executable, "-m", "covey.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def visit(node: NodeProcess, key: str) -> int:
    headers = {"X-Forwarded-For": "192.0.2.7", "x-api-key": key}  # what a proxy passes on is not from this machine
    return httpx.get(f"{node.url}/node_id", headers=headers, timeout=30).status_code


def test_a_lost_device_is_shut_out(tmp_path: Path) -> None:
    cluster = cluster_name()
    nodes: list[NodeProcess] = []
    try:
        for name in NAMES:
            replace_code(tmp_path / name, CODE)
            nodes.append(NodeProcess(tmp_path / name, name, cluster))
        anna, berta, lost = nodes
        for node in nodes:
            node.wait_listening()
        until(lambda: all(node.visibility() == dict.fromkeys(NAMES, "visible") for node in nodes))

        model = str(write_model(tmp_path / "model.gguf", layers=4))
        anna.post("/place_instance", {"model_id": model, "min_nodes": 2, "node_ids": [anna.node_id, berta.node_id]})
        until(lambda: list(anna.runners().values()) == ["Ready", "Ready"])
        key = berta.post("/keys", {"name": "laptop"})["key"]
        until(lambda: visit(anna, key) == 200)
        answer = berta.ask(model, "Where is it?", max_tokens=12)

        done = covey(tmp_path / "anna", cluster, "join-code", "rotate", "--without", "lost", "--url", anna.url)
        assert done.returncode == 0, done.stderr
        assert "2 nodes have the new one" in done.stdout
        assert "All API keys are revoked: laptop. `covey keys add NAME` makes new ones." in done.stdout
        shown = json.loads(covey(tmp_path / "berta", cluster, "join-code", "--json").stdout)["join_code"]
        assert shown in done.stdout
        assert shown != CODE.text()
        assert kept_code(tmp_path / "lost") == CODE
        for home in ("anna", "berta"):
            assert kept_code(tmp_path / home).text() == shown

        for node in (anna, berta):
            node.wait_listening()  # it tells again
        until(lambda: anna.visibility() == berta.visibility() == {"anna": "visible", "berta": "visible"})
        until(lambda: list(anna.runners().values()) == ["Ready", "Ready"])
        assert berta.ask(model, "Where is it?", max_tokens=12) == answer
        for node in (anna, berta):
            assert visit(node, key) == 401
            assert node.get("/keys") == {"keys": []}
        until(lambda: "visible" not in {lost.visibility().get(name) for name in ("anna", "berta")})
        for node in nodes:
            assert node.leave() == 0
            assert shown not in node.errors()
            assert CODE.text() not in node.errors()
            assert "Traceback" not in node.errors()
    finally:
        for node in nodes:
            node.end()


def test_a_node_that_is_stopped_right_after_a_rotation_has_forgotten_nothing(tmp_path: Path) -> None:
    """The new code is on the disk, and the life that would use it never begins; and so a second time."""
    cluster, home = cluster_name(), tmp_path / "anna"
    home.mkdir()
    node = NodeProcess(home, "anna", cluster)
    try:
        node.wait_listening()
        node.post("/keys", {"name": "laptop"})
        for _ in range(2):
            before = kept_code(home)
            done = covey(home, cluster, "join-code", "rotate", "--url", node.url)
            assert done.returncode == 0, done.stderr
            assert "API keys still valid: laptop; `covey keys revoke NAME` removes one." in done.stdout
            assert node.leave() == 0
            node.end()
            assert kept_code(home) != before
            node = NodeProcess(home, "anna", cluster)
            node.wait_listening()
            assert [each["name"] for each in node.get("/keys")["keys"]] == ["laptop"]
            assert len(list((home / "anna" / "clusters").iterdir())) == 1
    finally:
        node.end()


def test_who_does_not_hold_the_code_can_not_change_it(tmp_path: Path) -> None:
    cluster = cluster_name()
    for name in ("anna", "other"):
        (tmp_path / name).mkdir()
    node = NodeProcess(tmp_path / "anna", "anna", cluster)
    try:
        node.wait_listening()
        before = kept_code(tmp_path / "anna")
        done = covey(tmp_path / "other", cluster, "join-code", "rotate", "--url", node.url)
        assert done.returncode == 1
        assert done.stderr.startswith("Only who holds the join code may change it")
        done = covey(tmp_path / "anna", cluster, "join-code", "rotate", "--without", "nobody", "--url", node.url)
        assert done.returncode == 1
        assert done.stderr.startswith("No node is called nobody; here are: anna (")
        done = covey(tmp_path / "anna", cluster, "join-code", "rotate", "--without", "anna", "--url", node.url)
        assert "keeps it: run the command on one that stays" in done.stderr
        assert kept_code(tmp_path / "anna") == before
    finally:
        node.end()
