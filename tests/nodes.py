"""Real nodes as processes of their own, for tests that look at them from outside. The engine is the fake one, unless
another one is named.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

FAKE_OPTIONS = {"vocabulary_size": "259", "step_delay_ms": "5"}
START_S_MAX = 60.0  # a loaded machine; what is promised is measured from the moment that nodes listen
SCRIPT = """
import json
import sys
from pathlib import Path
from covey.node import NodeOptions, run_node
folder, cluster, port, ends_with_input, engine, engine_options, *peers = sys.argv[1:]
options = NodeOptions(
    port=int(port), data_dir=Path(folder), name=Path(folder).name, cluster=cluster, peers=tuple(peers),
    until_stdin_closes=bool(ends_with_input),
    interfaces=("127.0.0.1",),  # others who run these tests on this network are not to be heard
    engine=engine, engine_options=json.loads(engine_options),
)
sys.exit(run_node(options, lambda ready: print(ready.url, ready.node_id, flush=True)))
"""


class NodeProcess:
    """One node. `url` and `node_id` are known once `wait_listening` has returned."""

    def __init__(
        self,
        home: Path,
        name: str,
        cluster: str,
        port: int = 0,
        peers: tuple[str, ...] = (),
        *,
        ends_with_input: bool = False,
        engine: str = "fake",
        within: Sequence[str] = (),
        **engine_options: str,
    ) -> None:
        """`within`: a command that runs the one which follows it."""
        self.name = name
        options = json.dumps(FAKE_OPTIONS | engine_options if engine == "fake" else engine_options)
        self._log = home / f"{name}.stderr"
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *within,
                    sys.executable,
                    "-c",
                    SCRIPT,
                    str(home / name),
                    cluster,
                    str(port),
                    "x" * ends_with_input,
                    engine,
                    options,
                    *peers,
                ],
                stdin=subprocess.PIPE if ends_with_input else None,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "COVEY_HOME": str(home)},
            )
        self.url = self.node_id = ""

    def wait_listening(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.errors()
        self.url, self.node_id = line.split()

    def errors(self) -> str:
        return self._log.read_text()

    def get(self, path: str) -> Any:
        return httpx.get(self.url + path, timeout=30).raise_for_status().json()

    def post(self, path: str, body: Any) -> Any:
        response = httpx.post(self.url + path, json=body, timeout=120)
        assert response.is_success, response.text
        return response.json()

    @contextmanager
    def posting(self, path: str, body: Any, timeout_s: float = 60) -> Generator[httpx.Response]:
        """A streamed answer; `timeout_s` is how long it may be silent."""
        with httpx.stream("POST", self.url + path, json=body, timeout=timeout_s) as response:
            yield response

    def delete(self, path: str) -> Any:
        return httpx.delete(self.url + path, timeout=30).raise_for_status().json()

    def visibility(self) -> dict[str, str]:
        """Of each node this one knows of and has heard a report from, by name."""
        members = self.get("/cluster")["members"]
        return {each["report"]["name"]: each["visibility"] for each in members if each["report"]}

    def runners(self) -> dict[str, str]:
        members = self.get("/cluster")["members"]
        reports = [each["report"] for each in members if each["report"]]
        return {runner["runner_id"]: runner["state"] for report in reports for runner in report["runners"]}

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def ask(self, model: str, text: str, **fields: Any) -> str:
        body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, **fields}
        return self.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]

    def stream(self, model: str) -> threading.Thread:
        """A request whose answer goes on until something ends it."""
        body = {"model": model, "messages": [{"role": "user", "content": "?"}], "stream": True, "seed": 1}

        def listen() -> None:
            with suppress(httpx.RemoteProtocolError), self.posting("/v1/chat/completions", body) as response:
                for _ in response.iter_lines():
                    pass

        thread = threading.Thread(target=listen)
        thread.start()
        return thread

    def leave(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(20)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


def runner_of(node: NodeProcess) -> psutil.Process:
    [runner] = [each for each in node.children() if "covey.engine" in " ".join(each.cmdline())]
    return runner


def stop_all(node: NodeProcess) -> None:
    """As when the lid is closed: the node, its runner and its mesh process."""
    for process in [node.process, *node.children()]:
        process.send_signal(signal.SIGSTOP)


def until(condition: Callable[[], bool], timeout_s: float = START_S_MAX) -> float:
    """Seconds until it held."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, f"not within {timeout_s} s"
        time.sleep(0.02)
    return time.monotonic() - start


def cluster_name() -> str:
    return json.dumps([os.getpid(), time.monotonic_ns()])


@contextmanager
def running(
    home: Path, *names: str, cluster: str | None = None, ends_with_input: bool = False, **engine_options: str
) -> Generator[list[NodeProcess]]:
    """Nodes that have been started together and listen; ended by force if the test did not end them.

    `engine_options`: of the fake engine.
    """
    cluster = cluster or cluster_name()
    nodes = [NodeProcess(home, name, cluster, ends_with_input=ends_with_input, **engine_options) for name in names]
    try:
        for node in nodes:
            node.wait_listening()
        yield nodes
    finally:
        for node in nodes:
            node.end()
