"""Nodes on one machine that find each other over loopback, each with a real mesh process."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import psutil
import pytest
import zenoh
from credentials import CODE, OTHER_CODE, node

from covey.control.join_code import JoinCode
from covey.effects import mesh, mesh_child, mesh_process
from covey.effects.endpoints import mesh_port
from covey.effects.mesh import Mesh
from covey.effects.mesh_setup import MeshError, MeshSettings, mesh_setup
from covey.effects.trust import make_credentials
from covey.schema.cluster import CommandAnswer, Heartbeat, IntentUpdate, MeshMessage, NodeReport, TimedOut
from covey.schema.ids import NodeId
from covey.schema.machine import MessageReceived
from covey.schema.mesh import MeshSetup, Put, Urgency

pytestmark = pytest.mark.anyio

A, B, C = NodeId("a" * 32), NodeId("b" * 32), NodeId("c" * 32)


def settings_of(cluster: str, code: JoinCode = CODE, **fields: Any) -> MeshSettings:
    """On this machine alone."""
    return MeshSettings(credentials=make_credentials(code, node(0), cluster), interfaces=("127.0.0.1",), **fields)


def beat(node_id: NodeId, sequence: int = 1) -> Heartbeat:
    return Heartbeat(node_id, 1, sequence, (), None, "")


@pytest.fixture
def cluster() -> str:
    return f"test-{os.getpid()}-{time.monotonic_ns()}"


class Inbox:
    def __init__(self) -> None:
        self.messages: list[MeshMessage] = []
        self.notices: tuple[str, ...] = ()

    def __call__(self, received: MessageReceived) -> None:
        self.messages.append(received.message)

    def notice(self, notices: tuple[str, ...]) -> None:
        self.notices = notices


@asynccontextmanager
async def joined(node_id: NodeId, inbox: Inbox, settings: MeshSettings) -> AsyncGenerator[Mesh]:
    opened = mesh.opened(node_id, settings, inbox, inbox.notice)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(opened.run)
        yield opened
        tasks.cancel_scope.cancel()


async def send_until(send: Callable[[], object], arrived: Callable[[], bool], timeout_s: float = 8) -> float:
    """Sends every 50 ms until it has arrived; returns the seconds it took."""
    start = time.monotonic()
    with anyio.fail_after(timeout_s):
        while not arrived():
            send()
            await anyio.sleep(0.05)
    return time.monotonic() - start


def child_of(opened: Mesh) -> int:
    """The process id of its mesh process."""
    process = opened._child._process
    assert process is not None
    return process.pid


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# ---- nodes find each other ----


@pytest.mark.timed
async def test_two_nodes_find_each_other_in_under_three_seconds(cluster: str) -> None:
    inbox_a, inbox_b = Inbox(), Inbox()
    settings = settings_of(cluster)
    async with joined(A, inbox_a, settings) as a, joined(B, inbox_b, settings) as b:
        took_s = await send_until(
            lambda: (a.publish(beat(A)), b.publish(beat(B))), lambda: bool(inbox_a.messages and inbox_b.messages)
        )
    assert took_s < 3
    assert set(inbox_a.messages) == {beat(B)}  # and nobody hears himself
    assert set(inbox_b.messages) == {beat(A)}


async def test_what_is_sent_to_one_reaches_only_that_one(cluster: str) -> None:
    inboxes = {name: Inbox() for name in "abc"}
    settings = settings_of(cluster)
    answer = CommandAnswer("1", B, TimedOut(5))
    async with (
        joined(A, inboxes["a"], settings) as a,
        joined(B, inboxes["b"], settings),
        joined(C, inboxes["c"], settings),
    ):
        await send_until(lambda: a.publish(beat(A)), lambda: bool(inboxes["b"].messages and inboxes["c"].messages))
        await send_until(lambda: a.send_to(B, answer), lambda: answer in inboxes["b"].messages)
        await anyio.sleep(0.1)
    assert answer not in inboxes["c"].messages
    assert inboxes["a"].messages == []


async def test_clusters_of_different_names_do_not_mix(cluster: str) -> None:
    """Two users share a machine; and even one who names the other's address hears nothing."""
    inboxes = [Inbox(), Inbox(), Inbox()]
    async with (
        joined(A, inboxes[0], settings_of(cluster, port=free_port())) as a,
        joined(B, inboxes[1], settings_of(cluster + "x")) as b,
        joined(C, inboxes[2], settings_of(cluster)),
    ):
        await send_until(lambda: (a.publish(beat(A)), b.publish(beat(B))), lambda: bool(inboxes[2].messages))
        await anyio.sleep(0.3)
    assert inboxes[1].messages == []
    assert beat(B) not in inboxes[2].messages


def without_scouting(*values: object) -> MeshSetup:
    return msgspec.structs.replace(mesh_setup(*values), scouting_interfaces=())  # pyright: ignore[reportArgumentType]


async def test_a_named_peer_is_found_without_discovery(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that drops multicast: the second node names the first. It may even start before it."""
    monkeypatch.setattr(mesh, "mesh_setup", without_scouting)
    api_port = free_port()
    inbox_a, inbox_b = Inbox(), Inbox()
    late = settings_of(cluster, peers=(f"127.0.0.1:{api_port}",))
    async with joined(B, inbox_b, late) as b:
        await anyio.sleep(1)
        async with joined(A, inbox_a, settings_of(cluster, port=mesh_port(api_port))):
            await send_until(lambda: b.publish(beat(B)), lambda: bool(inbox_a.messages), 15)


async def test_a_taken_port_is_no_obstacle(cluster: str, caplog: pytest.LogCaptureFixture) -> None:
    inboxes = [Inbox(), Inbox()]
    settings = settings_of(cluster, port=free_port())
    with caplog.at_level(logging.WARNING):
        async with joined(A, inboxes[0], settings) as a, joined(B, inboxes[1], settings):
            await send_until(lambda: a.publish(beat(A)), lambda: bool(inboxes[1].messages))
    assert len([record for record in caplog.records if f"can't use port {settings.port}" in record.message]) == 1


# ---- what comes in ----


async def test_a_message_of_a_later_version_is_dropped_with_one_warning(
    cluster: str, caplog: pytest.LogCaptureFixture
) -> None:
    inbox_a, inbox_b = Inbox(), Inbox()
    settings = settings_of(cluster)
    async with joined(A, inbox_a, settings) as a, joined(B, inbox_b, settings) as b:
        await send_until(lambda: a.publish(beat(A)), lambda: bool(inbox_b.messages))
        with caplog.at_level(logging.WARNING):
            for payload in (b"\x00", msgspec.msgpack.encode({"type": "FromTheFuture"})) * 3:
                sealed = a._seal.close(payload, f"every/{A}")
                a._child.put(Put(f"every/{A}", sealed, Urgency.PATIENT))
            await send_until(lambda: a.publish(beat(A, 2)), lambda: beat(A, 2) in inbox_b.messages)
            await send_until(lambda: None, lambda: b.undecodable_count == 6)
    assert len([record for record in caplog.records if "not understood" in record.message]) == 1


@pytest.mark.timed
async def test_closing_is_quick_and_sending_afterwards_is_no_error(cluster: str) -> None:
    async with joined(A, Inbox(), settings_of(cluster)) as a:
        await send_until(lambda: None, lambda: a._child._is_open)
        process = psutil.Process(child_of(a))
        start = time.monotonic()
    assert time.monotonic() - start < 2
    assert not process.is_running()
    a.publish(beat(A))
    a.send_to(B, CommandAnswer("1", B, TimedOut(5)))


@pytest.mark.timed
async def test_a_frozen_peer_holds_up_nobody(cluster: str) -> None:
    """A laptop is closed: its connections stay open, and nothing is taken from them any more."""
    inbox_b = Inbox()
    settings = settings_of(cluster)
    async with joined(A, Inbox(), settings) as a, joined(B, inbox_b, settings) as b, joined(C, Inbox(), settings) as c:
        await send_until(lambda: a.publish(beat(A)), lambda: bool(inbox_b.messages))
        os.kill(child_of(b), signal.SIGSTOP)
        start = time.monotonic()
        big = Heartbeat(A, 1, 1, tuple(NodeId(f"{n:032}") for n in range(3000)), None, "")
        for _ in range(200):  # 20 MB, far over what the system buffers
            a.publish(big)
            await anyio.lowlevel.checkpoint()
        assert time.monotonic() - start < 5
        heard = Inbox()
        c._receive = heard
        await send_until(lambda: a.publish(beat(A, 3)), lambda: beat(A, 3) in heard.messages, 10)
        os.kill(child_of(b), signal.SIGKILL)


# ---- the process is replaced ----


@pytest.mark.timed
async def test_a_killed_mesh_process_is_replaced_and_what_may_wait_arrives(cluster: str) -> None:
    inbox_a, inbox_b = Inbox(), Inbox()
    settings = settings_of(cluster)
    async with joined(A, inbox_a, settings) as a, joined(B, inbox_b, settings) as b:
        await send_until(lambda: a.publish(beat(A)), lambda: bool(inbox_b.messages))
        first = child_of(a)
        os.kill(first, signal.SIGKILL)
        await send_until(lambda: None, lambda: not a._child._is_open)
        a.publish(beat(A, 2))  # dropped: the next one says more
        a.publish(IntentUpdate(A, {}))
        took_s = await send_until(lambda: None, lambda: IntentUpdate(A, {}) in inbox_b.messages, 15)
        await send_until(lambda: b.publish(beat(B)), lambda: beat(B) in inbox_a.messages)
        assert child_of(a) != first
    assert beat(A, 2) not in inbox_b.messages
    assert took_s < 8


def report(node_id: NodeId, sequence: int) -> NodeReport:
    return NodeReport(
        node_id=node_id,
        boot=1,
        sequence=sequence,
        name="",
        version="",
        api_address=None,
        hardware=None,
        downloads=(),
        runners=(),
    )


async def test_the_last_report_from_before_the_first_link_arrives(cluster: str) -> None:
    """An idle node reports every 10 s; until a lost report is said again, the others would not know its name."""
    inbox = Inbox()
    async with joined(A, Inbox(), settings_of(cluster)) as a:
        for sequence in (1, 2, 3):
            a.publish(report(A, sequence))
        a.send_to(B, report(A, 4))
        async with joined(B, inbox, settings_of(cluster)):
            await send_until(lambda: None, lambda: len(inbox.messages) == 2)
    assert set(inbox.messages) == {report(A, 3), report(A, 4)}  # two ways through the mesh: in either order


async def test_large_messages_of_a_neighbour_leave_no_memory_behind_that_outlives_it(cluster: str) -> None:
    """Zenoh can pass them through shared memory; what a killed process shares would stay mapped, 20 MB each time."""
    inbox = Inbox()
    settings = settings_of(cluster)
    large = msgspec.structs.replace(report(B, 1), name="x" * 20_000)
    async with joined(A, inbox, settings) as a, joined(B, Inbox(), settings) as b:
        await send_until(lambda: b.publish(large), lambda: bool(inbox.messages))
        assert inbox.messages[0] == large
        opened = [each.path for each in psutil.Process(child_of(a)).open_files()]
    assert [each for each in opened if each.endswith(".zenoh")] == []


async def test_a_hung_mesh_process_is_replaced(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh_child, "PING_S", 0.2)
    async with joined(A, Inbox(), settings_of(cluster)) as a:
        await send_until(lambda: None, lambda: a._child._is_open)
        first = child_of(a)
        os.kill(first, signal.SIGSTOP)
        await send_until(lambda: None, lambda: a._child._is_open and child_of(a) != first, 15)
        assert not psutil.pid_exists(first)


async def test_a_machine_that_slept_takes_a_new_process(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh_child, "PING_S", 0.2)
    asleep_ms = 0
    monkeypatch.setattr("covey.effects.clock.now_ms", lambda: time.monotonic_ns() // 1_000_000 + asleep_ms)
    async with joined(A, Inbox(), settings_of(cluster)) as a:
        await send_until(lambda: None, lambda: a._child._is_open)
        first = child_of(a)
        asleep_ms = 60_000
        await send_until(lambda: None, lambda: a._child._is_open and child_of(a) != first)


async def test_a_mesh_process_that_can_not_start_is_tried_again_with_patience(
    cluster: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mesh_child, "MESH_COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
    monkeypatch.setattr(mesh, "BACK_OFF_S", (0.0, 0.4, 100.0))
    async with joined(A, Inbox(), settings_of(cluster)) as a:
        for number in range(3 * mesh_child.WAITING_MAX):
            a.publish(IntentUpdate(A, {str(number): None}))  # pyright: ignore[reportArgumentType]
        await send_until(lambda: None, lambda: a._child.is_failure)
        await anyio.sleep(1.5)
        assert a._child.ending == "it ended"
    warnings = [record.message for record in caplog.records]
    assert any("is started anew: it ended" in each for each in warnings)
    assert any("one is dropped" in each for each in warnings)


NODE = """
import sys, anyio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from covey.effects import mesh, trust
from covey.effects.identity import Identity
from covey.effects.mesh_setup import MeshSettings
async def main():
    mine = Identity("a" * 32, 1, Ed25519PrivateKey.generate())
    settings = MeshSettings(credentials=trust.make_credentials(trust.new_join_code(), mine), interfaces=("127.0.0.1",))
    opened = mesh.opened("a" * 32, settings, print, print)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(opened.run)
        while not opened._child._is_open:
            await anyio.sleep(0.02)
        print(opened._child._process.pid, flush=True)
anyio.run(main)
"""


async def test_the_mesh_process_ends_with_its_node() -> None:
    with subprocess.Popen([sys.executable, "-c", NODE], stdout=subprocess.PIPE) as node:  # noqa: ASYNC220
        assert node.stdout is not None
        child = psutil.Process(int(node.stdout.readline()))
        node.kill()
        await send_until(lambda: None, lambda: not child.is_running(), 5)


async def test_the_mesh_process_imports_little() -> None:
    """It is replaced while people wait."""
    code = "import sys, covey.effects.mesh_process; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: ASYNC221
    assert {"fastapi", "anyio", "numpy", "cryptography", "psutil", "asyncio"} & set(done.stdout.split()) == set()


# ---- trust ----


async def test_only_members_are_linked(cluster: str) -> None:
    """All three scout in one group, and the stranger names a member's address besides."""
    port = free_port()
    ours, theirs = settings_of(cluster).credentials, settings_of(cluster, OTHER_CODE).credentials
    stranger = msgspec.structs.replace(
        theirs,
        scouting_group=ours.scouting_group,
        scouting_port=ours.scouting_port,
        cluster_id=ours.cluster_id,
    )
    inboxes = [Inbox(), Inbox(), Inbox()]
    known = settings_of(cluster, port=mesh_port(port))
    outsider = MeshSettings(credentials=stranger, peers=(f"127.0.0.1:{port}",), interfaces=("127.0.0.1",))
    async with (
        joined(A, inboxes[0], known) as a,
        joined(B, inboxes[1], settings_of(cluster)) as b,
        joined(C, inboxes[2], outsider) as c,
    ):
        await send_until(
            lambda: (a.publish(beat(A)), b.publish(beat(B)), c.publish(beat(C))),
            lambda: bool(inboxes[0].messages and inboxes[1].messages),
        )
        await send_until(lambda: None, lambda: bool(inboxes[2].notices), 12)
    assert set(inboxes[0].messages) == {beat(B)}
    assert set(inboxes[1].messages) == {beat(A)}
    assert inboxes[2].messages == []
    assert "belongs to another cluster" in inboxes[2].notices[0]


async def test_a_link_alone_is_not_enough_to_be_heard(cluster: str) -> None:
    """Zenoh connects to whoever has a certificate of an authority that browsers trust; what he says is not sealed."""
    inbox, heard = Inbox(), Inbox()
    member = settings_of(cluster)
    impostor = msgspec.structs.replace(
        member, credentials=msgspec.structs.replace(member.credentials, mesh_key=bytes(32))
    )
    async with joined(A, inbox, member) as a, joined(B, heard, impostor) as b:
        await send_until(lambda: (a.publish(beat(A)), b.publish(beat(B))), lambda: a.undecodable_count > 2)
        b._child.put(Put(f"every/{B}", msgspec.msgpack.encode(beat(B)), Urgency.BEAT))
        await anyio.sleep(0.2)
    assert inbox.messages == []
    assert heard.messages == []


@pytest.mark.parametrize("address", ["", ":1", "host:", "host:x", "host:0", "host:70000", "[]:80"])
async def test_what_is_no_address(address: str) -> None:
    with pytest.raises(MeshError, match="HOST:PORT"):
        mesh.opened(A, settings_of("x", peers=(address,)), Inbox(), print)


async def test_zenoh_ids_are_fresh() -> None:
    setup = without_scouting(A, settings_of("x"), [], [])
    sessions = [zenoh.open(mesh_process.config(setup, free_port(), has_scouting=False)) for _ in range(2)]
    assert len({str(session.zid()) for session in sessions}) == 2
    for session in sessions:
        session.close()
