"""A cluster of four nodes to break: three hold the model, one of them is asked and lives on, and one is spare.

Ids decide who leads: the lowest that is visible where nobody leads yet. So each data folder gets its identity first,
the node that is asked has the highest id, and the others are started after the one that is to lead.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import census
import httpx
import psutil
from lab import Host, Lab, Switch, lab
from nodes import NodeProcess, cluster_name
from up import Node

from covey.control.join_code import JoinCode
from covey.effects import identity

CODE = JoinCode(bytes(range(16))).text()
ASKED = "ada"  # lives on
NAMES = ("bea", "cleo", "dora", ASKED)  # in the order of their ids
STAGES = 3
SLOTS = 4
CONTEXT = 1024
SERVING = {"Ready", "Running"}
TOGETHER_S_MAX = 60.0
READY_S_MAX = 120.0

AnyNode = NodeProcess | Node


def until(condition: Callable[[], object], timeout_s: float, what: str, say: Callable[[], object] = str) -> float:
    """Seconds until it held. A node that does not answer now is asked again."""
    start = time.monotonic()
    while not _holds(condition):
        assert time.monotonic() - start < timeout_s, f"{what}: not within {timeout_s} s: {say()}"
        time.sleep(0.1)
    return time.monotonic() - start


def _holds(condition: Callable[[], object]) -> object:
    try:
        return condition()
    except httpx.HTTPError:
        return False


class Rig:
    """`leader`: the name of the one that is to lead at first."""

    def __init__(self, home: Path, model: Path, leader: str) -> None:
        self.home, self.model = home, model
        self.cluster = cluster_name()
        self.nodes: dict[str, AnyNode] = {}
        self.stopped: list[psutil.Process] = []
        self._leader = leader
        _name_by_id(home)

    # ---- nodes ----

    def begin(self) -> None:
        others = [name for name in NAMES if name not in {self._leader, ASKED}]
        for names in ((self._leader,), (ASKED,), others):
            for name in names:
                self.nodes[name] = self.make(name)
            for name in names:
                self.nodes[name].wait_listening()
            self.wait_together(names=[*self.nodes])
            until(self._is_led, TOGETHER_S_MAX, f"{self._leader} leads")

    def _is_led(self) -> bool:
        """By whom it should be, as all say that have been started."""
        leader = self.nodes[self._leader].node_id
        return all(node.get("/cluster")["leader"] == leader for node in self.nodes.values())

    def make(self, name: str) -> AnyNode:
        return NodeProcess(self.home, name, self.cluster, engine="onnx")

    def restart(self, name: str) -> None:
        self.nodes[name].end()
        self.nodes[name] = self.make(name)
        self.nodes[name].wait_listening()

    def end(self) -> None:
        self.go_on()
        for node in self.nodes.values():
            node.end()
        for process in census.ours(self.home):  # what a test that failed has left
            with suppress(psutil.Error):
                process.kill()

    @property
    def asked(self) -> AnyNode:
        return self.nodes[ASKED]

    def process_ids(self) -> list[int]:
        return [node.process.pid for node in self.nodes.values()]

    def state(self) -> dict[str, Any]:
        return self.asked.get("/cluster")

    def name_of(self, node_id: str | None) -> str:
        return next((name for name, node in self.nodes.items() if node.node_id == node_id), "")

    def leader(self) -> str:
        return self.name_of(self.state()["leader"])

    def wait_together(self, names: Sequence[str] = NAMES) -> float:
        """Seconds until each of these saw all of them."""

        def sees_all(node: AnyNode) -> bool:
            members = node.get("/cluster")["members"]
            seen = {each["report"]["name"] for each in members if each["report"] and each["visibility"] == "visible"}
            return seen >= set(names)

        nodes = [self.nodes[name] for name in names]
        return until(lambda: all(map(sees_all, nodes)), TOGETHER_S_MAX, "all see all", self.told)

    def told(self) -> str:
        state = self.state()
        members = [(each["report"] or {}).get("name", "?") + " " + each["visibility"] for each in state["members"]]
        runners = [(each["state"], each["reason"], each["waiting"]) for each in self.runner_reports(state).values()]
        stages = [[self.name_of(stage["node_id"]) for stage in each["stages"]] for each in state["instances"]]
        errors = {name: node.errors()[-600:] for name, node in self.nodes.items()}
        return json.dumps([members, self.name_of(state["leader"]), stages, runners, errors])

    # ---- the instance ----

    @staticmethod
    def runner_reports(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
        reports = [each["report"] for each in state["members"] if each["report"] and each["visibility"] == "visible"]
        return {runner["runner_id"]: runner for report in reports for runner in report["runners"]}

    def serving(self) -> dict[str, Any] | None:
        """The instance all of whose runners are ready, as the node that is asked sees it."""
        state = self.state()
        runners = self.runner_reports(state)

        def serves(stage: dict[str, Any]) -> bool:
            runner = runners.get(stage["runner_id"])
            return runner is not None and runner["state"] in SERVING

        return next((each for each in state["instances"] if all(map(serves, each["stages"]))), None)

    def holders(self) -> list[str]:
        """Names of the nodes of its stages, in order."""
        instance = self.serving()
        return [self.name_of(stage["node_id"]) for stage in instance["stages"]] if instance else []

    def wait_serving(self) -> float:
        return until(self.serving, READY_S_MAX, "an instance serves", self.told)

    def requests(self) -> int:
        """That any runner says it has."""
        runners = self.runner_reports(self.state()).values()
        return sum(runner["requests_running"] + runner["requests_queued"] for runner in runners)

    def arrange(self, *, holds: Sequence[str] = ()) -> None:
        """The model in three parts, the first at the node that is asked; on the nodes of these names, if any are."""
        wanted = set(holds)
        now = self.holders()
        if len(now) == STAGES and now[0] == ASKED and (not wanted or wanted == set(now)):
            return
        self.clear()
        node_ids = [self.nodes[name].node_id for name in holds]
        body = {"model_id": str(self.model), "min_nodes": STAGES, "slot_count": SLOTS, "context_length": CONTEXT}
        self.asked.post("/place_instance", {**body, "node_ids": node_ids})
        self.wait_serving()
        now = self.holders()
        assert (now[0], len(now)) == (ASKED, STAGES), now
        assert not wanted or set(now) == wanted, now

    def clear(self) -> None:
        for each in self.state()["instances"]:
            with suppress(Exception):  # one that lies dormant goes with its wish
                self.asked.delete(f"/instance/{each['instance_id']}")

        def is_clear() -> bool:
            state = self.state()
            return not (state["instances"] or state["wishes"] or self.runner_reports(state))

        until(is_clear, READY_S_MAX, "nothing is placed", self.told)

    def runner_of(self, name: str) -> psutil.Process:
        [runner] = [each for each in census.family(self.nodes[name].process.pid) if "covey.engine" in each.cmdline()]
        return runner

    # ---- what is done to them ----

    def stop(self, *processes: psutil.Process) -> None:
        """They live and do nothing."""
        for process in processes:
            process.send_signal(signal.SIGSTOP)
            self.stopped.append(process)

    def go_on(self) -> None:
        for process in self.stopped:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
        self.stopped.clear()


class LabRig(Rig):
    """Each node on a host of its own, all on one switch."""

    def __init__(self, home: Path, model: Path, leader: str, net: Lab) -> None:
        super().__init__(home, model, leader)
        self.lan: Switch = net.switch()
        self.hosts: dict[str, Host] = {
            name: net.host(name, self.lan, f"10.77.0.{number}/24") for number, name in enumerate(NAMES, 1)
        }

    def make(self, name: str) -> AnyNode:
        return Node(self.home, self.hosts[name], CODE, engine="onnx")

    def cut(self, name: str, *, is_cut: bool) -> None:
        self.lan.ports[list(self.hosts).index(name)].cut = is_cut


@contextmanager
def local(
    home: Path, model: Path, leader: str, around: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Generator[Rig]:
    """On this machine. `around` holds while the nodes run; the data folders are there by then."""
    with _own_scratch(home):
        rig = Rig(home, model, leader)
        with around():
            try:
                rig.begin()
                yield rig
            finally:
                rig.end()


@contextmanager
def apart(home: Path, model: Path, leader: str) -> Generator[LabRig]:
    """On machines of their own."""
    with _own_scratch(home), lab(home) as net:
        rig = LabRig(home, model, leader, net)
        try:
            rig.begin()
            yield rig
        finally:
            rig.end()


@contextmanager
def _own_scratch(home: Path) -> Generator[None]:
    """What our processes leave in the folder for temporary files is then seen."""
    before = os.environ.get("TMPDIR")
    scratch = home / "scratch"
    scratch.mkdir()
    os.environ["TMPDIR"] = str(scratch)
    try:
        yield
    finally:
        os.environ.pop("TMPDIR")
        if before is not None:
            os.environ["TMPDIR"] = before


def _name_by_id(home: Path) -> None:
    """Makes a data folder for each name, so that their order is that of the ids."""
    found: dict[str, Path] = {}
    for number in range(len(NAMES)):
        folder = home / f"fresh-{number}"
        with identity.claimed(folder) as made:
            found[made.node_id] = folder
    for name, node_id in zip(NAMES, sorted(found), strict=True):
        found[node_id].rename(home / name)
