"""Real causes, brought about, and named by the command; and after it all is as it was."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from typer.testing import CliRunner

from covey.cli.doctor import looking
from covey.cli.doctor.finding import Finding, Level
from covey.cli.doctor.looking import Asked, findings
from covey.cli.main import app
from covey.effects import beacon, multicast, multicast_trial
from covey.effects.beacon import Beacons
from covey.effects.code_file import replace_code
from covey.effects.trust import OPEN_CODE, cluster_id_of
from covey.schema.mesh import MESH_PROTOCOL, BeaconSetup
from tests.cli.served_node import ServedNode
from tests.credentials import CODE, OTHER_CODE
from tests.desktop.fake_managers import SYSTEMCTL, place

NO_NODE = "127.0.0.1:53281"
HERE = ("127.0.0.1",)
IS_ROOT = os.geteuid() == 0
CAN_MOUNT = IS_ROOT and sys.platform == "linux" and shutil.which("unshare")
CAN_BE_NOBODY = IS_ROOT and shutil.which("setpriv")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is in it; and no node of this machine is heard, and nobody wants to wait."""
    made = tmp_path / "home"
    made.mkdir(mode=0o700)
    monkeypatch.setenv("COVEY_HOME", str(made))
    monkeypatch.delenv("COVEY_CLUSTER", raising=False)
    monkeypatch.setattr(beacon, "PORT", 23600 + secrets.randbelow(100))
    monkeypatch.setattr(beacon, "GROUP_4", f"239.255.66.{1 + secrets.randbelow(250)}")
    monkeypatch.setattr(beacon, "EAGER_S", (0.0, 0.05))
    monkeypatch.setattr(beacon, "PERIOD_S", 0.1)
    monkeypatch.setattr(looking, "LISTEN_S", 0.4)
    monkeypatch.setattr(looking, "SCOUTING_S_MAX", 0.4)
    monkeypatch.setattr(multicast_trial, "SENT_AFTER_S", (0.0, 0.1))
    return made


def by_check(found: list[Finding]) -> dict[str, Finding]:
    """The worst of each."""
    order = list(Level)
    return {each.check: each for each in sorted(found, key=lambda each: order.index(each.level))}


def looked(**asked: Any) -> dict[str, Finding]:
    return by_check(findings(Asked(**{"url": NO_NODE, "interfaces": HERE, **asked})))


def doctor(home: Path, *before: str, **more: str) -> tuple[int, dict[str, dict[str, str]]]:
    """The command as a process, with `before` its words: its status, and what each check says at its worst."""
    environment = {**os.environ, "COVEY_HOME": str(home), **more}
    command = [*before, sys.executable, "-m", "covey.cli", "doctor", "--json", "--url", NO_NODE, "--interface", "lo"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert done.stdout, done.stderr
    told = json.loads(done.stdout)
    order = [level.value for level in Level]
    assert told["has_problems"] == bool(done.returncode)
    return done.returncode, {
        each["check"]: each for each in sorted(told["checks"], key=lambda each: order.index(each["level"]))
    }


def snapshot(folder: Path) -> list[tuple[str, int, int, bytes]]:
    return [
        (str(path), path.stat().st_mode, path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted([folder, *folder.rglob("*")])
    ]


def test_before_the_first_start_nothing_is_wrong_and_nothing_is_made(home: Path) -> None:
    status, found = doctor(home)
    assert status == 0, found
    assert {"node", "port", "multicast", "clock", "disk", "memory", "join code", "engine"} <= set(found)
    assert list(home.iterdir()) == []


def test_with_a_node(home: Path, node: ServedNode) -> None:
    found = looked(url=node.url)
    assert found["node"].level is Level.OK
    assert "port" not in found, "it is the node's"


def test_with_the_options_that_the_node_was_started_with(home: Path, node: ServedNode, tmp_path: Path) -> None:
    """--host and --port lead to it as --url does, and stand above the environment; its folder is looked at."""
    started = ("doctor", "--port", str(urlsplit(node.url).port), "--data-dir", str(tmp_path), "--open", "--json")
    for options in (started, (*started, "--host", "0.0.0.0")):  # noqa: S104 - as a person may write it
        done = CliRunner().invoke(app, [*options, "--interface", "lo"], env={"COVEY_URL": NO_NODE})
        checks = json.loads(done.stdout)["checks"]
        seen = [each["seen"] for each in checks if each["check"] in {"node", "folder"}]
        assert f"answers at {node.url} and sees" in seen[0]
        assert any(str(tmp_path) in each for each in seen)
    refused = CliRunner().invoke(app, [*started, "--url", node.url], env={"COLUMNS": "200"})
    assert refused.exit_code == 2
    assert "--url excludes --host and --port" in refused.stderr


def test_an_address_that_this_machine_does_not_have(home: Path) -> None:
    found = looked(host="192.0.2.1", url="http://192.0.2.1:53281")
    assert (found["port"].level, found["port"].seen) == (Level.PROBLEM, "192.0.2.1 is no address of this machine.")


@pytest.fixture
def stranger() -> Iterator[int]:
    """Another program at the port."""

    class NotFound(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), NotFound) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def test_a_port_in_use_and_by_whom(home: Path, stranger: int) -> None:
    found = looked(url=f"127.0.0.1:{stranger}")
    assert found["port"].level is Level.PROBLEM
    assert f"(process {os.getpid()})" in found["port"].seen
    assert "something else does" in found["node"].seen


def test_who_listens_and_says_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that was stopped with Ctrl-Z."""
    monkeypatch.setattr(looking, "ANSWER_S_MAX", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found = looked(url=f"127.0.0.1:{listener.getsockname()[1]}")
    assert found["node"].level is Level.PROBLEM
    assert "timed out" in found["node"].seen


def heard_from(cluster: str, sender: str) -> None:
    Beacons(BeaconSetup(cluster, (("lo", "127.0.0.1"),)), sender, 4000, lambda _: None, lambda _: False).start()


def test_another_cluster_on_the_network(home: Path) -> None:
    replace_code(home, CODE)
    heard_from(cluster_id_of(CODE), "aa")
    assert looked()["clusters"].seen == "No other cluster is heard, and 1 node of this one."
    heard_from(cluster_id_of(OTHER_CODE), "bb")
    found = looked()["clusters"]
    assert found.level is Level.WARNING
    assert "Another cluster of Covey is on this network" in found.seen


def test_the_open_cluster_is_that_of_a_node_that_was_started_so(home: Path) -> None:
    heard_from(cluster_id_of(OPEN_CODE), "cc")
    assert "the open one" in looked()["clusters"].seen
    found = looked(anyone_joins=True)
    assert "the open one" not in found["clusters"].seen
    assert "join code" not in found


def test_another_version_on_the_network(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beacon, "MESH_PROTOCOL", MESH_PROTOCOL + 1)
    heard_from(cluster_id_of(CODE), "aa")
    found = looked()["versions"]
    assert found.level is Level.PROBLEM
    assert "127.0.0.1 (newer)" in found.seen


def test_multicast_that_a_program_keeps_for_itself(home: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as alone:
        alone.bind(("", beacon.PORT))
        found = looked()["multicast"]
    assert found.level is Level.PROBLEM
    assert "Address already in use" in found.seen
    assert looked()["multicast"].level is Level.OK


def test_multicast_that_does_not_come_back(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a firewall."""
    monkeypatch.setattr(multicast, "join", lambda *_: None)
    assert "it does not come back" in looked()["multicast"].seen


def test_where_nodes_of_one_cluster_look_for_one_another(home: Path) -> None:
    assert "discovery" not in looked(), "without a code nobody knows where that is"
    replace_code(home, CODE)
    assert looked()["discovery"].level is Level.OK


def test_peers(home: Path) -> None:
    assert looked(peers=("127.0.0.1:53285",))["peer"].level is Level.WARNING
    replace_code(home, CODE)
    with socket.create_server(("127.0.0.1", 54286)):
        found = [
            each.seen
            for each in findings(Asked(url=NO_NODE, interfaces=HERE, peers=("127.0.0.1:53285", "203.0.113.7", "?:?")))
            if each.check == "peer"
        ]
    assert "is not reached at TCP port 54285" in found[0]
    assert found[1] == "The peer 203.0.113.7 is not in a network of this machine, so it is not asked."
    assert "is not the address of a peer" in found[2]


def test_a_code_that_others_can_read_stays_as_it_is(home: Path) -> None:
    """The node would mend it; the doctor tells."""
    replace_code(home, CODE)
    (home / "join-code").chmod(0o644)
    before = snapshot(home)
    assert looked()["join code"].level is Level.PROBLEM
    (home / "join-code").chmod(0o600)
    assert looked()["join code"].level is Level.OK
    (home / "join-code").chmod(0o644)
    assert snapshot(home) == before


def test_too_few_open_files(home: Path) -> None:
    _, found = doctor(home, "/bin/sh", "-c", 'ulimit -n 200; exec "$@"', "sh")
    assert found["open files"]["level"] == "problem"
    assert "200" in found["open files"]["seen"]


def test_a_library_that_can_not_be_loaded(home: Path, tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text('raise ImportError("libgomp.so.1: cannot open shared object file")\n')
    _, found = doctor(home, PYTHONPATH=str(tmp_path))
    assert found["engine"]["level"] == "problem"
    assert "libgomp.so.1" in found["engine"]["seen"]


@pytest.mark.skipif(not CAN_BE_NOBODY, reason="it takes root to be somebody else")
def test_a_folder_of_somebody_else() -> None:
    nobody = ["setpriv", "--reuid=65534", "--clear-groups"]
    if subprocess.run([*nobody, sys.executable, "-c", "import covey"], capture_output=True, check=False).returncode:
        pytest.skip("nobody else can get at this program")
    with tempfile.TemporaryDirectory() as made:  # below pytest's own folder nobody else gets
        Path(made).chmod(0o755)
        status, found = doctor(Path(made), *nobody)
    assert status == 1
    assert found["folder"]["level"] == "problem"
    assert "can't be written" in found["folder"]["seen"]


@pytest.mark.skipif(not CAN_MOUNT, reason="it takes root and unshare to mount a disk")
@pytest.mark.parametrize(
    ("options", "check"), [("size=1m", "disk"), ("size=1g,nr_inodes=50", "disk"), ("ro", "folder")]
)
def test_a_disk_that_is_full_or_can_not_be_written(home: Path, options: str, check: str) -> None:
    mount = f'mount -t tmpfs -o {options} none "$COVEY_HOME" && exec "$@"'
    status, found = doctor(home, "unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", mount, "sh")
    assert (status, found[check]["level"]) == (1, "problem")


@pytest.mark.skipif(sys.platform == "darwin", reason="the fake is of Linux's systemctl")
def test_a_service_that_does_not_run(home: Path, tmp_path: Path) -> None:
    place(tmp_path / "bin", "systemctl", SYSTEMCTL.replace("{folder}", f"{tmp_path}/bin"))
    unit = tmp_path / "config" / "systemd" / "user" / "covey.service"
    unit.parent.mkdir(parents=True)
    unit.write_text("[Service]\n")
    _, found = doctor(home, PATH=f"{tmp_path}/bin:/usr/bin:/bin", XDG_CONFIG_HOME=str(tmp_path / "config"))
    assert found["service"]["level"] == "warning"
    assert "journalctl" in found["service"]["advice"]


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, found = doctor(tmp_path / "file")
    assert (status, found["folder"]["level"]) == (1, "problem")
    assert "is a file" in found["folder"]["seen"]


def test_a_narrow_terminal_gets_all_of_it(home: Path) -> None:
    command = [sys.executable, "-m", "covey.cli", "doctor", "--url", NO_NODE, "--interface", "lo"]
    done = subprocess.run(
        command, env={**os.environ, "COVEY_HOME": str(home)}, capture_output=True, text=True, timeout=60, check=False
    )
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["check", "is", "what", "was", "seen,", "and", "what", "to", "do"]
    assert not [line for line in lines if line != line.rstrip()]
    assert lines[-1].endswith(".")
