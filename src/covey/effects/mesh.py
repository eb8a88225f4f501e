"""Messages between nodes, carried by Zenoh in peer mode: nodes find each other by multicast and by gossip.

Links are not authenticated yet, so everything stays on the loopback interface: the listener, and the scouting.
A cluster's name decides the multicast port and the prefix of all keys, so that clusters do not mix on one machine.
Zenoh's own id is fresh for each process: with two processes of one id nobody would see either.
"""

import hashlib
import ipaddress
import json
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import anyio
import anyio.to_thread
import msgspec
import zenoh
from msgspec import Struct

from covey.effects.probe import loopback_interface
from covey.schema.cluster import Heartbeat, MeshMessage, NodeReport
from covey.schema.ids import NodeId
from covey.schema.machine import MessageReceived

API_PORT_DEFAULT: Final = 52415
PORT_OFFSET: Final = 1000  # a node's mesh port is its API port and this: one address to remember
PORT_MAX: Final = 65535
SCOUTING_PORT_FIRST: Final = 20000  # below the ranges that systems hand out to outgoing connections
SCOUTING_PORT_COUNT: Final = 10000
MESSAGE_BYTES_MAX: Final = 16 * 1024 * 1024  # a whole intent of thousands of instances is under 4 MB
OUTBOX_MAX: Final = 1024
WARNED_MAX: Final = 256
CLOSE_MS_MAX: Final = 2000

_EVERYBODY: Final = "every"
_ONE: Final = "to"

_log = logging.getLogger(__name__)


class MeshError(Exception):
    """The mesh can't be opened; the message is one sentence for a person."""


class MeshSettings(Struct, frozen=True, kw_only=True):
    cluster: str
    port: int = 0  # taken if it is free, else any
    peers: tuple[str, ...] = ()  # as people write them: HOST or HOST:PORT, the port of that node's API
    interface: str | None = None  # None: loopback


def mesh_port(api_port: int) -> int:
    """Where a node whose API listens at `api_port` awaits its peers."""
    return api_port + PORT_OFFSET if api_port + PORT_OFFSET <= PORT_MAX else api_port - PORT_OFFSET


def peer_endpoint(address: str) -> str:
    """Zenoh's name for a peer, given as HOST or HOST:PORT with the port of its API. Raises `MeshError`."""
    host, colon, port = address.rpartition(":")
    if not colon or (address.count(":") > 1 and not host.endswith("]")):
        host, port = address, str(API_PORT_DEFAULT)  # no port; an IPv6 address without brackets is all host
    host = host.strip("[]")
    if not host or not port.isdigit() or not 0 < int(port) <= PORT_MAX:
        raise MeshError(f"{address!r} is not the address of a peer; write it as HOST or HOST:PORT")
    if not _is_loopback(host):
        raise MeshError(
            f"{address} is on another machine, and nodes talk over the loopback interface alone until their links are "
            "authenticated, which this version can't do yet"
        )
    return f"tcp/{f'[{host}]' if ':' in host else host}:{mesh_port(int(port))}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Outgoing(Struct, frozen=True):
    key: str
    message: MeshMessage


class Mesh:
    """An open session. What is received goes to `receive`, which is called on Zenoh's threads."""

    def __init__(self, node_id: NodeId, session: zenoh.Session, receive: Callable[[MessageReceived], None]) -> None:
        self._node_id = node_id
        self._session = session
        self._receive = receive
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(MeshMessage)
        self._outbox, self._outgoing = anyio.create_memory_object_stream[_Outgoing](OUTBOX_MAX)
        self._warned: set[tuple[str, str]] = set()
        self.undecodable_count = 0
        for key in (f"{_EVERYBODY}/*", f"{_ONE}/{node_id}/*"):
            session.declare_subscriber(key, self._on_sample)

    def publish(self, message: MeshMessage) -> None:
        self._send(_Outgoing(f"{_EVERYBODY}/{self._node_id}", message))

    def send_to(self, target: NodeId, message: MeshMessage) -> None:
        self._send(_Outgoing(f"{_ONE}/{target}/{self._node_id}", message))

    async def run(self) -> None:
        """Sends what may wait for a slow peer, in a thread; what ages quickly never queues behind it."""
        async for outgoing in self._outgoing:
            await anyio.to_thread.run_sync(
                partial(self._put, outgoing, zenoh.CongestionControl.BLOCK), abandon_on_cancel=True
            )

    async def close(self) -> None:
        self._outbox.close()
        self._outgoing.close()
        with anyio.move_on_after(CLOSE_MS_MAX / 1000, shield=True):
            await anyio.to_thread.run_sync(self._close, abandon_on_cancel=True)

    def _send(self, outgoing: _Outgoing) -> None:
        if isinstance(outgoing.message, Heartbeat | NodeReport):
            self._put(outgoing, zenoh.CongestionControl.DROP)  # the next one says more
            return
        try:
            self._outbox.send_nowait(outgoing)
        except anyio.ClosedResourceError:
            return  # the node is leaving, and whoever waits for this message has to live without it
        except anyio.WouldBlock:
            self._warn("outbox", "full", "other nodes take messages too slowly; one is dropped")

    def _put(self, outgoing: _Outgoing, congestion: zenoh.CongestionControl) -> None:
        is_urgent = isinstance(outgoing.message, Heartbeat)
        try:
            self._session.put(
                outgoing.key,
                self._encoder.encode(outgoing.message),
                congestion_control=congestion,
                priority=zenoh.Priority.INTERACTIVE_HIGH if is_urgent else zenoh.Priority.DATA,
                express=is_urgent,
                allowed_destination=zenoh.Locality.REMOTE,
            )
        except zenoh.ZError as error:
            self._warn("put", str(error), f"a message could not be sent to the other nodes: {error}")

    def _on_sample(self, sample: zenoh.Sample) -> None:
        origin = str(sample.key_expr).rpartition("/")[2]
        try:
            self._receive(MessageReceived(self._decode(sample)))
        except msgspec.DecodeError as error:  # a validation error is one
            self.undecodable_count += 1
            self._warn(origin, type(error).__name__, f"a message of node {origin} is not understood: {error}")

    def _decode(self, sample: zenoh.Sample) -> MeshMessage:
        if len(sample.payload) > MESSAGE_BYTES_MAX:
            raise msgspec.DecodeError(f"{len(sample.payload)} bytes; the limit is {MESSAGE_BYTES_MAX}")
        return self._decoder.decode(sample.payload.to_bytes())

    def _warn(self, origin: str, kind: str, sentence: str) -> None:
        """Once per origin and kind."""
        if (origin, kind) not in self._warned and len(self._warned) < WARNED_MAX:
            self._warned.add((origin, kind))
            _log.warning("%s", sentence)

    def _close(self) -> None:
        try:
            self._session.close()
        except zenoh.ZError as error:
            _log.warning("the mesh did not close cleanly: %s", error)


@asynccontextmanager
async def opened(
    node_id: NodeId, settings: MeshSettings, receive: Callable[[MessageReceived], None]
) -> AsyncGenerator[Mesh]:
    """A mesh that is closed at the end of the block, within a bound. Raises `MeshError`."""
    mesh = Mesh(node_id, await anyio.to_thread.run_sync(_open, settings), receive)
    try:
        yield mesh
    finally:
        await mesh.close()


def _open(settings: MeshSettings) -> zenoh.Session:
    """Tries the preferred port, then any; and where the system knows no multicast, goes without discovery."""
    endpoints = [peer_endpoint(address) for address in settings.peers]
    attempts = [(settings.port, True), (0, True), (0, False)]
    for port, has_scouting in attempts[:-1]:
        try:
            return zenoh.open(_config(settings, endpoints, port, has_scouting=has_scouting))
        except zenoh.ZError as error:
            _log.warning("the mesh can't use port %d: %s", port, error)
    try:
        session = zenoh.open(_config(settings, endpoints, 0, has_scouting=False))
    except zenoh.ZError as error:
        raise MeshError(f"the network between nodes can't be opened ({error}); check the loopback interface") from None
    _log.warning("this machine allows no discovery by multicast; name other nodes with --peer")
    return session


def _config(settings: MeshSettings, endpoints: list[str], port: int, *, has_scouting: bool) -> zenoh.Config:
    digest = hashlib.sha256(settings.cluster.encode()).digest()
    scouting_port = SCOUTING_PORT_FIRST + int.from_bytes(digest[:4], "little") % SCOUTING_PORT_COUNT
    values: dict[str, Any] = {
        "mode": "peer",
        "namespace": f"covey/{digest.hex()[:16]}",
        "listen/endpoints": [f"tcp/127.0.0.1:{port}"],
        "connect/endpoints": endpoints,
        "scouting/multicast/enabled": has_scouting,
        "scouting/multicast/address": f"224.0.0.224:{scouting_port}",
        "scouting/multicast/interface": settings.interface or loopback_interface(),
        "transport/link/rx/max_message_size": MESSAGE_BYTES_MAX * 2,
    }
    config = zenoh.Config()
    for key, value in values.items():
        config.insert_json5(key, json.dumps(value))
    return config
