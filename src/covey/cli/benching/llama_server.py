"""llama.cpp's `llama-server` on loopback, as the other side of a measurement: started, held still, and ended here."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Generator, Sequence
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import IO, Final

import psutil

from covey.cli.benching.asking import Server
from covey.cli.benching.figures import Case
from covey.cli.client import CliError
from covey.cli.local_nodes import HOST, first_port
from covey.engine.parent import ending_with_parent

NAME: Final = "llama.cpp"
PROGRAM: Final = "llama-server"
LOAD_SECONDS_MAX: Final = 600.0  # a large file from a slow disk
STOP_SECONDS_MAX: Final = 10.0
POLL_SECONDS: Final = 0.1
CONTEXT_SPARE: Final = 1.25  # words of a prompt may take more tokens than the two prompts that were counted
CONTEXT_MORE: Final = 64  # tokens
LOG_LINES_SHOWN: Final = 5
LOG_BYTES_READ: Final = 8_192


def found(given: Path | None) -> Path:
    """The program. Raises `CliError`."""
    path = shutil.which(given.expanduser() if given else PROGRAM)
    if path is None:
        where = f"{given} is no program" if given else f"There is no {PROGRAM} on the PATH"
        raise CliError(f"{where}: build llama.cpp with its server, and name that with --llama-server PATH.")
    return Path(path).absolute()


def command(program: Path, model: Path, thread_count: int, cases: Sequence[Case]) -> list[str]:
    """Without its port. As many slots as requests at once, and in each room for the longest."""
    slots = max(case.concurrency for case in cases)
    tokens = max(case.prompt_tokens + case.new_tokens for case in cases)
    context = slots * (round(CONTEXT_SPARE * tokens) + CONTEXT_MORE)
    return [
        *(str(program), "--model", str(model), "--host", HOST),
        *("--threads", str(thread_count), "--parallel", str(slots), "--ctx-size", str(context)),
    ]


class LlamaServer:
    """One process, which answers once `start` has returned. It is stopped but for its turns, so that it does nothing
    meanwhile, and ends with this process even if that is killed (on Linux).
    """

    def __init__(self, command: Sequence[str], model_id: str, log: IO[bytes]) -> None:
        port = first_port(0)
        self.server = Server(NAME, f"http://{HOST}:{port}", model_id)
        self._port = port
        self._command = [*command, "--port", str(port)]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Raises `CliError`."""
        # A session of its own: Ctrl-C reaches the measurement alone, which then ends its server.
        self._process = subprocess.Popen(  # noqa: S603 (the program that was named)
            ending_with_parent(self._command),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        deadline = time.monotonic() + LOAD_SECONDS_MAX
        while not self._is_ready():
            if self._process.poll() is not None:
                raise CliError(f"{PROGRAM} ended with status {self._process.returncode}:\n{self._last_lines()}")
            if time.monotonic() > deadline:
                raise CliError(f"{PROGRAM} was not ready after {LOAD_SECONDS_MAX:.0f} s:\n{self._last_lines()}")
            time.sleep(POLL_SECONDS)
        self._signal(signal.SIGSTOP)

    def end(self) -> None:
        """Waits for the end; kills what does not come to one."""
        if self._process is not None:
            self._signal(signal.SIGTERM)
            self._signal(signal.SIGCONT)
            try:
                self._process.wait(STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    @contextlib.contextmanager
    def turn(self) -> Generator[None]:
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def memory_bytes(self) -> int:
        """Raises `CliError`."""
        assert self._process is not None, "a server that was started"
        try:
            return int(psutil.Process(self._process.pid).memory_info().rss)
        except psutil.NoSuchProcess:
            raise CliError(f"{PROGRAM} has ended:\n{self._last_lines()}") from None

    def _is_ready(self) -> bool:
        """It listens before it has loaded, and says so."""
        connection = HTTPConnection(HOST, self._port, timeout=LOAD_SECONDS_MAX)
        with contextlib.closing(connection):
            try:
                connection.request("GET", "/health")
                return connection.getresponse().status == HTTPStatus.OK
            except OSError:
                return False

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def _last_lines(self) -> str:
        log = self._log.fileno()  # whose place in the file is the server's, too
        beginning = max(0, os.fstat(log).st_size - LOG_BYTES_READ)
        lines = os.pread(log, LOG_BYTES_READ, beginning).decode(errors="replace").splitlines()
        return "\n".join(lines[-LOG_LINES_SHOWN:])


@contextlib.contextmanager
def running(command: Sequence[str], model_id: str) -> Generator[LlamaServer]:
    """Ended in any case. Raises `CliError`."""
    with tempfile.TemporaryFile() as log:
        server = LlamaServer(command, model_id, log)
        try:
            server.start()
            yield server
        finally:
            server.end()
