"""The demo's nodes: whatever they do, none is left behind."""

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from covey.cli import local_nodes
from covey.cli.client import CliError
from covey.cli.local_nodes import LocalNode, end_nodes, first_port, start_nodes, wait_together

STUBBORN = "#!/bin/sh\ntrap '' TERM\nsleep 600 &\necho $! > {marker}\nwait\n"
DYING = "#!/bin/sh\necho 'port 52415 is in use' >&2\nexit 1\n"


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a shell script in the place of Python, and so of `covey up`."""

    def install(script: str) -> Path:
        program = tmp_path / "python"
        program.write_text(script.format(marker=tmp_path / "marker"))
        program.chmod(0o755)
        monkeypatch.setattr(local_nodes.sys, "executable", str(program))
        return tmp_path / "marker"

    return install


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_node_that_does_not_leave_is_killed_with_all_that_it_started(
    pretend: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = pretend(STUBBORN)
    monkeypatch.setattr(local_nodes, "STOP_SECONDS_MAX", 0.3)
    nodes: list[LocalNode] = []
    start_nodes(tmp_path, 2, 0, nodes)
    wait_until(lambda: marker.exists() and marker.read_text().strip())
    child = psutil.Process(int(marker.read_text()))
    end_nodes(nodes)
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    for node in nodes:
        assert node._process is not None
        assert node._process.returncode is not None


def test_a_node_that_ends_by_itself_is_told_with_its_last_words(pretend: Callable[[str], Path], tmp_path: Path) -> None:
    pretend(DYING)
    nodes: list[LocalNode] = []
    start_nodes(tmp_path, 1, 0, nodes)
    with pytest.raises(CliError, match="node-1 ended with status 1:\nport 52415 is in use"):
        wait_together(nodes)
    end_nodes(nodes)


def test_a_node_that_can_not_be_started_leaves_those_before_it_to_be_ended(
    pretend: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(STUBBORN)
    started: list[LocalNode] = []
    real = subprocess.Popen

    def second_fails(*arguments: object, **options: object) -> object:
        if len(started) == 2:
            raise OSError("no more processes")
        return real(*arguments, **options)

    monkeypatch.setattr(local_nodes.subprocess, "Popen", second_fails)
    with pytest.raises(OSError, match="no more processes"):
        start_nodes(tmp_path, 2, 0, started)
    assert [node._process is None for node in started] == [False, True]
    monkeypatch.setattr(local_nodes, "STOP_SECONDS_MAX", 0.2)
    end_nodes(started)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port where somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_where_the_usual_port_is_in_use_the_next_free_one_is_taken(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_nodes, "DEFAULT_PORT", taken)
    assert taken < first_port(None) < taken + local_nodes.PORTS_TRIED_MAX


def test_a_port_that_was_asked_for_is_taken_or_none(taken: int) -> None:
    with pytest.raises(CliError, match=f"Port {taken} is in use; .* choose another with --port"):
        first_port(taken)


def test_the_first_node_listens_where_it_should(pretend: Callable[[str], Path], tmp_path: Path) -> None:
    pretend(DYING)
    nodes: list[LocalNode] = []
    start_nodes(tmp_path, 2, 53199, nodes)
    end_nodes(nodes)
    assert nodes[0].url == "http://127.0.0.1:53199"
    assert nodes[1].url != nodes[0].url
