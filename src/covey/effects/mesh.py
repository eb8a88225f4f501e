"""Messages between nodes. Zenoh carries them, in a process of its own that is replaced when the network changes.

What is sent to everybody has the key "every/ORIGIN", what is for one node "to/TARGET/ORIGIN". Every link is
mutual TLS, and every message is sealed besides.
"""

import logging
from collections import deque
from collections.abc import Callable
from typing import Final

import anyio
import anyio.to_thread
import msgspec

from covey.effects import beacon, clock, interfaces, peer_check
from covey.effects.interfaces import Place
from covey.effects.mesh_child import MeshChild, Waiting
from covey.effects.mesh_setup import EVERYBODY, ONE, MeshSettings, mesh_setup, peers_of
from covey.effects.neighbours import Neighbours
from covey.effects.sealing import Seal, SealError
from covey.schema.cluster import Heartbeat, MeshMessage, NodeReport
from covey.schema.ids import NodeId
from covey.schema.machine import MessageReceived
from covey.schema.mesh import (
    BeaconHeard,
    FromMesh,
    Got,
    Linked,
    MulticastBlocked,
    MulticastWorks,
    Opened,
    Put,
    Urgency,
)

LOOK_S: Final = 2.0  # at this machine's addresses; a look takes half a millisecond
BACK_OFF_S: Final = (0.0, 1.0, 4.0, 15.0, 60.0)  # before the next process; the last one for ever
HEALTHY_S: Final = 30.0  # a process that lived so long was no failure
LOST_S: Final = 10.0  # without any peer, after there was one
LOST_S_MAX: Final = 300.0  # the others may simply be switched off
PEERS_LOOK_S: Final = 5.0
DIALS_MAX: Final = 64
DIALS_AT_ONCE_MAX: Final = 3  # in DIAL_SPACING_S: a stranger who forges beacons can't have the process replaced
DIAL_SPACING_S: Final = 60.0  # ... more often
LINKS_LOOK_S: Final = 1.0
WARNED_MAX: Final = 256

_log = logging.getLogger(__name__)

Receive = Callable[[MessageReceived], object]
Notice = Callable[[tuple[str, ...]], object]
_WAYS: Final = "other nodes find it by multicast, but not by `--peer` with the port of its API"


class Mesh:
    """`receive` is told what others say; `notice` what a person should know about the network, whenever it changes."""

    def __init__(self, node_id: NodeId, settings: MeshSettings, receive: Receive, notice: Notice) -> None:
        credentials = settings.credentials
        self._node_id = node_id
        self._settings = settings
        self._receive = receive
        self._notice = notice
        self._seal = Seal(credentials.mesh_key)
        self._neighbours = Neighbours(credentials.cluster_id)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(MeshMessage)
        self._waiting = Waiting()
        self._child = MeshChild(self._waiting, self._hear, clock.now_ms)
        self._dials: list[str] = []
        self._dialled_s: deque[float] = deque([-DIAL_SPACING_S] * DIALS_AT_ONCE_MAX, DIALS_AT_ONCE_MAX)
        self._places: list[Place] = []
        self._lost_since_s: float | None = None
        self._lost_s_max = LOST_S
        self._blocked: dict[str, str] = {}
        self._unreached: tuple[str, ...] = ()
        self._notices: tuple[str, ...] = ()
        self._warned: set[tuple[str, str]] = set()
        self.undecodable_count = 0

    # ---- what the node says ----

    def publish(self, message: MeshMessage) -> None:
        self._send(f"{EVERYBODY}/{self._node_id}", message)

    def send_to(self, target: NodeId, message: MeshMessage) -> None:
        self._send(f"{ONE}/{target}/{self._node_id}", message)

    def _send(self, key: str, message: MeshMessage) -> None:
        body = self._encoder.encode(message)
        put = Put(key, self._seal.close(body, key), _urgency(message))
        if not self._child.put(put):
            self._warn("outbox", "full", "other nodes take messages too slowly; one is dropped")

    # ---- its life ----

    async def run(self) -> None:
        """Keeps one mesh process alive, for ever. Cancelling it ends the process."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._look_at_addresses)
            tasks.start_soon(self._look_at_peers)
            failures = 0
            while True:
                started_s = anyio.current_time()
                failures = 0 if await self._live() else failures + 1
                if anyio.current_time() - started_s > HEALTHY_S:
                    failures = 0
                await anyio.sleep(BACK_OFF_S[min(failures, len(BACK_OFF_S) - 1)])

    async def _live(self) -> bool:
        """One process. True if it ended because we wanted another."""
        self._places = await self._usable()
        setup = mesh_setup(self._node_id, self._settings, self._places, self._dials)
        child = self._child = MeshChild(self._waiting, self._hear, clock.now_ms)
        self._blocked.clear()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._look_at_links, child)
            await child.run(setup)
            tasks.cancel_scope.cancel()
        if child.is_failure:
            self._warn("child", child.ending, f"the mesh process is started anew: {child.ending}")
        else:
            _log.info("the mesh process is started anew: %s", child.ending)
        return not child.is_failure

    async def _usable(self) -> list[Place]:
        places = await anyio.to_thread.run_sync(interfaces.all_places)
        return interfaces.usable(places, self._settings.interfaces)

    async def _look_at_addresses(self) -> None:
        """For ever. An address that came, or came back, counts when it is still there at the next look."""
        came: set[Place] = set()
        while True:
            await anyio.sleep(LOOK_S)
            seen = await self._usable()
            stayed = came & set(seen)
            came = set(seen) - set(self._places)
            self._places = [place for place in self._places if place in seen]
            if stayed & came:
                self._dials.clear()  # they may lead nowhere from here
                self._child.end(f"{', '.join(sorted(address for _, address in stayed & came))} can be used now")

    async def _look_at_links(self, child: MeshChild) -> None:
        """Ends `child` when it has lost all peers for long, or when one is heard that it does not find."""
        while True:
            await anyio.sleep(LINKS_LOOK_S)
            now_s = anyio.current_time()
            if self._lost_since_s is not None and now_s - self._lost_since_s > self._lost_s_max:
                self._lost_since_s = now_s
                self._lost_s_max = min(2 * self._lost_s_max, LOST_S_MAX)
                child.end("no other node is reached any more")
            self._dial_missed(child, now_s)
            self._refresh_notices()

    def _dial_missed(self, child: MeshChild, now_s: float) -> None:
        missed = self._neighbours.dials(now_s)
        found = [where for where in missed if where not in self._dials]
        if found and len(self._dials) < DIALS_MAX and now_s - self._dialled_s[0] >= DIAL_SPACING_S:
            self._dialled_s.append(now_s)
            self._dials += found
            child.end(f"a node of this cluster is at {', '.join(found)} and was not found by scouting")

    async def _look_at_peers(self) -> None:
        """For ever: says why none of the peers that a person named is reached."""
        peers = peers_of(self._settings)
        while peers:
            await anyio.sleep(PEERS_LOOK_S)
            self._unreached = (
                () if self._child.linked else await peer_check.examine(peers, self._settings.credentials.authority)
            )
            self._refresh_notices()

    # ---- what the process says ----

    def _hear(self, message: FromMesh) -> None:
        match message:
            case Got(key, payload):
                self._take(key, payload)
            case Opened():
                self._hear_opened(message)
            case Linked(count):
                self._hear_linked(count)
            case BeaconHeard():
                self._neighbours.hear(anyio.current_time(), message)
                self._refresh_notices()
            case MulticastBlocked(interface, reason):
                self._blocked[interface] = reason
            case MulticastWorks(interface):
                self._blocked.pop(interface, None)
            case _:
                pass

    def _take(self, key: str, payload: bytes) -> None:
        origin = key.rpartition("/")[2]
        try:
            self._receive(MessageReceived(self._decoder.decode(self._seal.open(payload, key))))
        except (msgspec.DecodeError, SealError) as error:  # a validation error is a decode error
            self.undecodable_count += 1
            self._warn(origin, type(error).__name__, f"a message of node {origin} is not understood: {error}")

    def _hear_opened(self, opened: Opened) -> None:
        wanted = self._settings.port
        if wanted not in {0, opened.port}:
            self._warn("port", str(opened.port), f"the mesh can't use port {wanted}, and uses {opened.port}: {_WAYS}")
        if not opened.scouts_as_wanted:
            self._warn("scouting", "", "this machine allows no discovery by multicast; name other nodes with --peer")

    def _hear_linked(self, count: int) -> None:
        if count:
            self._lost_since_s, self._lost_s_max = None, LOST_S
            self._unreached = ()
        elif self._lost_since_s is None:
            self._lost_since_s = anyio.current_time()

    def _refresh_notices(self) -> None:
        others = self._neighbours.notices(anyio.current_time())
        blocked = [_blocked(interface, reason) for interface, reason in sorted(self._blocked.items())]
        notices = (*others, *blocked, *self._unreached)
        if notices == self._notices:
            return
        for sentence in notices:
            self._warn("network", sentence, sentence)
        self._notices = notices
        self._notice(notices)

    def _warn(self, origin: str, kind: str, sentence: str) -> None:
        """Once per origin and kind."""
        if (origin, kind) not in self._warned and len(self._warned) < WARNED_MAX:
            self._warned.add((origin, kind))
            _log.warning("%s", sentence)


def _urgency(message: MeshMessage) -> Urgency:
    match message:
        case Heartbeat():
            return Urgency.BEAT
        case NodeReport():
            return Urgency.FRESH
        case _:
            return Urgency.PATIENT


def _blocked(interface: str, reason: str) -> str:
    why = f"it can't be sent: {reason}" if reason else "what is sent does not come back"
    return (
        f"multicast does not work on {interface} ({why}), so nodes do not find each other there; allow UDP port "
        f"{beacon.PORT} in the firewall, or name the other node with --peer ADDRESS"
    )


def opened(node_id: NodeId, settings: MeshSettings, receive: Receive, notice: Notice) -> Mesh:
    """A mesh that works while its `run` does. Raises `MeshError`."""
    peers_of(settings)
    return Mesh(node_id, settings, receive, notice)
