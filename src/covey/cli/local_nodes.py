"""Nodes that the demo starts on this machine, and ends again, whatever happens."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Final

import psutil

from covey.cli.client import DEFAULT_PORT, CliError, NodeAwayError, NodeClient
from covey.schema.cluster import Visibility

HOST: Final = "127.0.0.1"
START_SECONDS_MAX: Final = 40.0  # small boards import slowly
POLL_SECONDS: Final = 0.05
STOP_SECONDS_MAX: Final = 15.0  # a node ends its runners within 10 s
LOG_LINES_SHOWN: Final = 15
PORTS_TRIED_MAX: Final = 100  # more demos than one machine runs


class LocalNode:
    """One `covey up` process, its address and its log. It leaves when this process is gone, even if by SIGKILL:
    its standard input is a pipe that only we hold.
    """

    def __init__(self, folder: Path, name: str, port: int) -> None:
        self.name = name
        self.url = f"http://{HOST}:{port}"
        self._log = folder / f"{name}.log"
        self._command = [sys.executable, "-m", "covey.cli", "up", "--host", HOST, "--port", str(port)]
        self._command += ["--name", name, "--data-dir", str(folder / name), "--interface", HOST, "--until-stdin-closes"]
        self._process: subprocess.Popen[bytes] | None = None  # not started

    def start(self, cluster: str) -> None:
        """Raises `OSError`."""
        with self._log.open("wb") as log:
            # A session of its own: Ctrl-C reaches the demo alone, which then ends its nodes in order.
            self._process = subprocess.Popen(  # noqa: S603 (our own program)
                self._command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, "COVEY_CLUSTER": cluster},
                start_new_session=True,
            )

    def check(self) -> None:
        """Raises `CliError` with the end of its log if the process is gone."""
        status = self._process.poll() if self._process else None
        if status is not None:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:])
            raise CliError(f"{self.name} ended with status {status}:\n{tail}")

    def ask_to_end(self) -> None:
        if self._process and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def end(self, seconds: float) -> None:
        """Waits for the end; kills what does not come to one."""
        if self._process is None:
            return
        assert self._process.stdin is not None, "a pipe"
        self._process.stdin.close()
        try:
            self._process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            for process in _family(self._process.pid):  # its runners may hang as well as it
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.wait()


def _family(process_id: int) -> list[psutil.Process]:
    """A process and all that it started, as far as they are still there."""
    try:
        process = psutil.Process(process_id)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def start_nodes(folder: Path, count: int, port: int, into: list[LocalNode]) -> None:
    """Starts `count` nodes that form a cluster of their own; each is in `into` before it is started.

    `port` is the first one's; the others take any.
    """
    cluster = f"demo-{os.getpid()}"
    for number in range(1, count + 1):
        node = LocalNode(folder, f"node-{number}", port if number == 1 else _bound(0))
        into.append(node)  # before there is a process, so that whatever fails from then on finds it
        node.start(cluster)


def end_nodes(nodes: list[LocalNode]) -> None:
    """All at once, within `STOP_SECONDS_MAX`."""
    with _uninterrupted():
        for node in nodes:
            node.ask_to_end()
        deadline = time.monotonic() + STOP_SECONDS_MAX
        for node in nodes:
            node.end(deadline - time.monotonic())


@contextlib.contextmanager
def _uninterrupted() -> Generator[None]:
    """Impatient signals leave no process behind; what they would cut short takes a bounded time."""
    before = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_together(nodes: list[LocalNode]) -> None:
    """Until every node sees all others. Raises `CliError` if one ends, or if it takes too long."""
    deadline = time.monotonic() + START_SECONDS_MAX
    with contextlib.ExitStack() as held:
        waiting = [(node.name, held.enter_context(NodeClient(node.url))) for node in nodes]
        while waiting:
            for node in nodes:
                node.check()
            waiting = [(name, client) for name, client in waiting if _seen(client) < len(nodes)]
            if waiting and time.monotonic() > deadline:
                name, client = waiting[0]
                raise CliError(
                    f"After {START_SECONDS_MAX:.0f} s {name} sees {_seen(client)} of {len(nodes)} nodes: "
                    "is multicast on the loopback interface blocked?"
                )
            time.sleep(POLL_SECONDS)


def _seen(client: NodeClient) -> int:
    try:
        state = client.cluster()
    except NodeAwayError:
        return 0
    return sum(member.visibility is Visibility.VISIBLE and member.report is not None for member in state.members)


def first_port(asked: int | None) -> int:
    """Where the first node's API can listen: at the port that was asked for; else at the default one, or the next that
    is free. Raises `CliError`.
    """
    first = DEFAULT_PORT if asked is None else asked
    for port in range(first, first + (PORTS_TRIED_MAX if asked is None else 1)):
        with contextlib.suppress(OSError):
            return _bound(port)
    raise CliError(f"Port {first} is in use; end the program that listens there, or choose another with --port.")


def _bound(port: int) -> int:
    """The port, if it is free now; any for 0. Raises `OSError`."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as nodes do
        listener.bind((HOST, port))
        return int(listener.getsockname()[1])
