"""Nodes on the hosts of a lab: real processes, with the fake engine unless another one is named."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from lab import Host, inside
from nodes import FAKE_OPTIONS

START_S_MAX = 60.0
SCRIPT = """
import json
import sys
from pathlib import Path
from covey.cli import joining
from covey.node import NodeOptions, run_node
joining.take_code(None)
folder, name, engine, engine_options, *peers = sys.argv[1:]
options = NodeOptions(
    data_dir=Path(folder), name=name, peers=tuple(peers), engine=engine, engine_options=json.loads(engine_options),
)
sys.exit(run_node(options, lambda ready: print(ready.url, ready.node_id, flush=True)))
"""


class Node:
    """One node on one host."""

    def __init__(
        self,
        home: Path,
        host: Host,
        code: str,
        peers: tuple[str, ...] = (),
        name: str = "",
        *,
        engine: str = "fake",
    ) -> None:
        self.host, self.name, self.home = host, name or host.name, home
        self._log = home / f"{self.name}.stderr"
        options = json.dumps(FAKE_OPTIONS if engine == "fake" else {})
        environment = {**os.environ, "COVEY_HOME": str(home / self.name), "COVEY_JOIN": code}
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                host.run(sys.executable, "-c", SCRIPT, str(home / self.name), self.name, engine, options, *peers),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        self.url = self.node_id = ""
        self.started_s = 0.0

    def wait_listening(self) -> None:
        assert self.process.stdout is not None
        lines = iter(self.process.stdout.readline, "")
        line = next(
            (line for line in lines if line.startswith("http")), ""
        )  # before that it tells which cluster it joins
        assert line, self.errors()
        self.url, self.node_id = line.split()
        self.started_s = time.monotonic()

    def errors(self) -> str:
        return self._log.read_text()

    def get(self, path: str) -> Any:
        with inside(self.host.namespace):
            return httpx.get(self.url + path, timeout=30).raise_for_status().json()

    def post(self, path: str, body: Any) -> Any:
        with inside(self.host.namespace):
            response = httpx.post(self.url + path, json=body, timeout=120)
        assert response.is_success, response.text
        return response.json()

    def delete(self, path: str) -> Any:
        with inside(self.host.namespace):
            return httpx.delete(self.url + path, timeout=30).raise_for_status().json()

    @contextmanager
    def posting(self, path: str, body: Any, timeout_s: float = 60) -> Generator[httpx.Response]:
        """A streamed answer; `timeout_s` is how long it may be silent."""
        with ExitStack() as held:
            with inside(self.host.namespace):
                client = held.enter_context(httpx.Client(timeout=timeout_s))
                response = held.enter_context(client.stream("POST", self.url + path, json=body))
            yield response

    def visible(self) -> set[str]:
        """Names of the nodes that this one sees, itself too."""
        members = self.get("/cluster")["members"]
        return {each["report"]["name"] for each in members if each["report"] and each["visibility"] == "visible"}

    def runner_states(self) -> list[str]:
        reports = [each["report"] for each in self.get("/cluster")["members"] if each["report"]]
        return [runner["state"] for report in reports for runner in report["runners"]]

    def notices(self) -> list[str]:
        return self.get("/cluster")["notices"]

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(20)
        if self.process.stdout is not None:
            self.process.stdout.close()


class Nodes:
    """Starts nodes, and ends them all at once."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._nodes: list[Node] = []

    def up(self, *hosts: Host, code: str, peers: tuple[str, ...] = ()) -> list[Node]:
        nodes = [Node(self._home, host, code, peers) for host in hosts]
        self._nodes += nodes
        for node in nodes:
            node.wait_listening()
        return nodes

    def end(self) -> None:
        for node in self._nodes:
            if node.process.poll() is None:
                node.process.send_signal(signal.SIGTERM)
        for node in self._nodes:
            node.end()


def until(condition: Callable[[], object], timeout_s: float, say: Callable[[], object] = str) -> float:
    """Seconds until it held."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, f"not within {timeout_s} s: {say()}"
        time.sleep(0.05)
    return time.monotonic() - start


def together(nodes: list[Node], timeout_s: float = 10) -> float:
    """Seconds until every node saw all."""
    names = {node.name for node in nodes}

    def say() -> str:
        return json.dumps({node.name: [sorted(node.visible()), node.notices(), node.errors()[-800:]] for node in nodes})

    took_s = until(lambda: all(node.visible() >= names for node in nodes), timeout_s, say)
    print(f"together after {took_s:.1f} s")
    return took_s
