"""Nodes on one machine that find each other over loopback, as real Zenoh sessions."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import anyio
import msgspec
import pytest
import zenoh

from covey.effects import mesh
from covey.effects.mesh import Mesh, MeshError, MeshSettings, mesh_port, peer_endpoint
from covey.schema.cluster import CommandAnswer, Heartbeat, MeshMessage, TimedOut
from covey.schema.ids import NodeId
from covey.schema.machine import MessageReceived

pytestmark = pytest.mark.anyio

A, B = NodeId("a" * 32), NodeId("b" * 32)


def beat(node_id: NodeId, sequence: int = 1) -> Heartbeat:
    return Heartbeat(node_id, 1, sequence, (), None, "")


@pytest.fixture
def cluster() -> str:
    return f"test-{os.getpid()}-{time.monotonic_ns()}"


class Inbox:
    def __init__(self) -> None:
        self.messages: list[MeshMessage] = []

    def __call__(self, received: MessageReceived) -> None:
        self.messages.append(received.message)


@asynccontextmanager
async def joined(node_id: NodeId, inbox: Inbox, settings: MeshSettings) -> AsyncGenerator[Mesh]:
    async with mesh.opened(node_id, settings, inbox) as opened, anyio.create_task_group() as tasks:
        tasks.start_soon(opened.run)
        yield opened
        tasks.cancel_scope.cancel()


async def send_until(send: Callable[[], None], arrived: Callable[[], bool], timeout_s: float = 5) -> float:
    """Sends every 50 ms until it has arrived; returns the seconds it took."""
    start = time.monotonic()
    with anyio.fail_after(timeout_s):
        while not arrived():
            send()
            await anyio.sleep(0.05)
    return time.monotonic() - start


async def test_two_nodes_find_each_other_in_under_three_seconds(cluster: str) -> None:
    inbox_a, inbox_b = Inbox(), Inbox()
    settings = MeshSettings(cluster=cluster)
    async with joined(A, inbox_a, settings) as a, joined(B, inbox_b, settings) as b:

        def send() -> None:
            a.publish(beat(A))
            b.publish(beat(B))

        took_s = await send_until(send, lambda: bool(inbox_a.messages and inbox_b.messages))
    assert took_s < 3
    assert set(inbox_a.messages) == {beat(B)}  # and nobody hears himself
    assert set(inbox_b.messages) == {beat(A)}


async def test_what_is_sent_to_one_reaches_only_that_one(cluster: str) -> None:
    inboxes = {name: Inbox() for name in "abc"}
    settings = MeshSettings(cluster=cluster)
    answer = CommandAnswer("1", B, TimedOut(5))
    async with (
        joined(A, inboxes["a"], settings) as a,
        joined(B, inboxes["b"], settings),
        joined(NodeId("c" * 32), inboxes["c"], settings),
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
        joined(A, inboxes[0], MeshSettings(cluster=cluster, port=free_port())) as a,
        joined(B, inboxes[1], MeshSettings(cluster=cluster + "x")) as b,
        joined(NodeId("c" * 32), inboxes[2], MeshSettings(cluster=cluster)),
    ):
        await send_until(lambda: (a.publish(beat(A)), b.publish(beat(B))), lambda: bool(inboxes[2].messages))
        await anyio.sleep(0.3)
    assert inboxes[1].messages == []
    assert beat(B) not in inboxes[2].messages


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


async def test_a_named_peer_is_found_without_discovery(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that drops multicast: the second node names the first. It may even start before it."""
    real = mesh._config
    monkeypatch.setattr(mesh, "_config", lambda *values, **_: real(*values, has_scouting=False))
    api_port = free_port()
    inbox_a, inbox_b = Inbox(), Inbox()
    started = time.monotonic()
    late = MeshSettings(cluster=cluster, peers=(f"127.0.0.1:{api_port}",))
    async with joined(B, inbox_b, late) as b:
        assert time.monotonic() - started < 2  # a peer that is not there holds up nobody
        async with joined(A, inbox_a, MeshSettings(cluster=cluster, port=mesh_port(api_port))):
            await send_until(lambda: b.publish(beat(B)), lambda: bool(inbox_a.messages), 15)


async def test_a_taken_port_is_no_obstacle(cluster: str) -> None:
    port = free_port()
    inboxes = [Inbox(), Inbox()]
    settings = MeshSettings(cluster=cluster, port=port)
    async with joined(A, inboxes[0], settings) as a, joined(B, inboxes[1], settings):
        await send_until(lambda: a.publish(beat(A)), lambda: bool(inboxes[1].messages))


async def test_a_message_of_a_later_version_is_dropped_with_one_warning(
    cluster: str, caplog: pytest.LogCaptureFixture
) -> None:
    inbox_a, inbox_b = Inbox(), Inbox()
    settings = MeshSettings(cluster=cluster)
    async with joined(A, inbox_a, settings) as a, joined(B, inbox_b, settings) as b:
        await send_until(lambda: a.publish(beat(A)), lambda: bool(inbox_b.messages))
        with caplog.at_level(logging.WARNING):
            for payload in (b"\x00", msgspec.msgpack.encode({"type": "FromTheFuture"})) * 3:
                a._session.put(f"every/{A}", payload, allowed_destination=zenoh.Locality.REMOTE)
            await send_until(lambda: a.publish(beat(A, 2)), lambda: beat(A, 2) in inbox_b.messages)
    assert b.undecodable_count == 6
    assert len([record for record in caplog.records if "not understood" in record.message]) == 1


async def test_closing_is_quick_and_sending_afterwards_is_no_error(cluster: str) -> None:
    inbox = Inbox()
    async with joined(A, inbox, MeshSettings(cluster=cluster)) as a:
        pass
    start = time.monotonic()
    await a.close()
    a.publish(beat(A))
    a.send_to(B, CommandAnswer("1", B, TimedOut(5)))
    assert time.monotonic() - start < 2


FROZEN = """
import sys, time, zenoh
from covey.effects.mesh import MeshSettings, _open
session = _open(MeshSettings(cluster=sys.argv[1]))
subscriber = session.declare_subscriber("**", lambda sample: print("heard", flush=True))
time.sleep(60)
"""


async def test_a_frozen_peer_holds_up_nobody(cluster: str) -> None:
    """A laptop is closed: its connections stay open, and nothing is taken from them any more."""
    inbox = Inbox()
    command = [sys.executable, "-c", FROZEN, cluster]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as peer:  # noqa: ASYNC220 - ended below by its id
        assert peer.stdout is not None
        os.set_blocking(peer.stdout.fileno(), False)
        try:
            async with joined(A, inbox, MeshSettings(cluster=cluster)) as a:
                await send_until(lambda: a.publish(beat(A)), lambda: bool(peer.stdout.read()), 10)
                peer.send_signal(signal.SIGSTOP)
                start = time.monotonic()
                big = Heartbeat(A, 1, 1, tuple(NodeId(f"{n:032}") for n in range(3000)), None, "")
                for _ in range(200):  # 20 MB, far over what the system buffers
                    a.publish(big)
                assert time.monotonic() - start < 5
        finally:
            peer.kill()


@pytest.mark.parametrize(
    ("address", "endpoint"),
    [
        ("127.0.0.5", "tcp/127.0.0.5:53415"),
        ("localhost:52420", "tcp/localhost:53420"),
        ("[::1]:52420", "tcp/[::1]:53420"),
        ("::1", "tcp/[::1]:53415"),
        ("localhost:65000", "tcp/localhost:64000"),
    ],
)
async def test_addresses_of_peers(address: str, endpoint: str) -> None:
    assert peer_endpoint(address) == endpoint


@pytest.mark.parametrize("address", ["192.168.1.5", "studio.local:52420", "[fe80::1]:52420"])
async def test_another_machine_is_not_reached_in_clear_text(address: str) -> None:
    with pytest.raises(MeshError, match="another machine"):
        peer_endpoint(address)


@pytest.mark.parametrize("address", ["", ":1", "host:", "host:x", "host:0", "host:70000", "[]:80"])
async def test_what_is_no_address(address: str) -> None:
    with pytest.raises(MeshError, match="HOST:PORT"):
        peer_endpoint(address)


async def test_zenoh_ids_are_fresh() -> None:
    settings = MeshSettings(cluster="x")
    sessions = [zenoh.open(mesh._config(settings, [], 0, has_scouting=False)) for _ in range(2)]
    assert len({str(session.zid()) for session in sessions}) == 2
    for session in sessions:
        session.close()
