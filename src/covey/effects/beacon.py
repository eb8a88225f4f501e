"""The beacon: a few bytes to one well-known multicast group, by which nodes of any cluster learn of one another.

It works over IPv4 and IPv6, from each usable address, and is read from strangers: what comes in is bounded in length
and rate, and nothing of it is shown that is not a number or a hex digit. Runs in a thread of the mesh process.
"""

import select
import socket
import string
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
from msgspec import Struct

from covey.effects import multicast
from covey.schema.mesh import (
    BEACON_BYTES_MAX,
    BEACON_MAGIC,
    MESH_PROTOCOL,
    Beacon,
    BeaconHeard,
    BeaconSetup,
    MulticastBlocked,
    MulticastWorks,
)

GROUP_4: Final = "239.255.67.79"  # RFC 2365: never leaves the site
GROUP_6: Final = "ff12::434f"  # RFC 4291: transient, never leaves the link
PORT: Final = 19415  # UDP; below the ranges that systems hand out to outgoing connections
PERIOD_S: Final = 4.0  # a node that arrives is known within 5 s even where its own first beacons are lost
EAGER_S: Final = (0.0, 1.0, 1.0, 2.0)  # before the first beacons of a life
ANSWER_SPACING_S: Final = 1.0  # a newcomer is answered at once, but not more often than that
TOLD_SPACING_S: Final = 3.0
SENDERS_MAX: Final = 256
FORGOTTEN_S: Final = 3 * PERIOD_S
READ_PER_S_MAX: Final = 200  # beacons of 800 nodes; what is more is a flood, and waits or is lost
OWN_LOST_MAX: Final = 3  # own beacons that did not come back before the interface counts as blocked
PORT_MAX: Final = 65535
COUNT_MAX: Final = 100_000
CLUSTER_LENGTH: Final = 16
SENDER_LENGTH_MAX: Final = 32

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Beacon)

Tell = Callable[[BeaconHeard | MulticastBlocked | MulticastWorks], None]


def pack(beacon: Beacon) -> bytes:
    return BEACON_MAGIC + _encoder.encode(beacon)


def parse(data: bytes) -> Beacon | None:
    """None for what is no beacon, or says something that no node of any version would."""
    if not data.startswith(BEACON_MAGIC) or len(data) > BEACON_BYTES_MAX:
        return None
    try:
        beacon = _decoder.decode(data[len(BEACON_MAGIC) :])
    except msgspec.DecodeError:
        return None
    return beacon if _is_plausible(beacon) else None


def _is_plausible(beacon: Beacon) -> bool:
    return (
        len(beacon.cluster) == CLUSTER_LENGTH
        and 0 < len(beacon.sender) <= SENDER_LENGTH_MAX
        and set(beacon.cluster + beacon.sender) <= set(string.hexdigits.lower())
        and 0 < beacon.port <= PORT_MAX
        and 0 < beacon.node_count <= COUNT_MAX
        and 0 < beacon.protocol <= COUNT_MAX
    )


class _Link:
    """One address that beacons are sent from."""

    def __init__(self, number: int, interface: str, address: str) -> None:
        self.number, self.interface, self.address = number, interface, address
        self.lost_count = 0  # own beacons since one came back
        self.is_blocked = False
        self.socket = multicast.sender(interface, address)

    def send(self, data: bytes) -> str:
        """Empty, or why it can't be sent."""
        target = (GROUP_6, PORT) if ":" in self.address else (GROUP_4, PORT)
        try:
            self.socket.sendto(data, target)
        except OSError as error:
            return error.strerror or str(error)
        return ""


class _Sender(Struct):
    """Another node's mesh process."""

    heard_s: float
    told_s: dict[str, float]  # by address


class Beacons(threading.Thread):
    """`is_linked(sender)` says whether the mesh has a connection to that process. `tell` is called on this thread."""

    def __init__(
        self, setup: BeaconSetup, sender: str, port: int, tell: Tell, is_linked: Callable[[str], bool]
    ) -> None:
        super().__init__(name="beacon", daemon=True)
        self.node_count = 1
        self._cluster, self._sender, self._port = setup.cluster, sender, port
        self._tell, self._is_linked = tell, is_linked
        self._senders: dict[str, _Sender] = {}
        self._links: list[_Link] = []
        for number, (interface, address) in enumerate(setup.addresses):
            try:
                self._links.append(_Link(number, interface, address))
            except OSError as error:
                tell(MulticastBlocked(interface, error.strerror or str(error)))
        self._receivers = self._made_receivers()
        self._sent_s = self._read_s = time.monotonic()
        self._due_s = self._sent_s
        self._eager = list(EAGER_S[1:])
        self._read_count = 0

    def _made_receivers(self) -> list[socket.socket]:
        try:
            return _receivers(self._links)
        except OSError as error:
            for link in self._links:
                link.is_blocked = True
                self._tell(MulticastBlocked(link.interface, f"UDP port {PORT}: {error.strerror or error}"))
            return []

    def run(self) -> None:
        while True:
            wait_s = max(0.0, self._due_s - time.monotonic())
            for receiver in select.select(self._receivers, [], [], wait_s)[0]:
                self._read(receiver)
            if time.monotonic() >= self._due_s:
                self._send()

    # ---- sending ----

    def _send(self) -> None:
        now_s = time.monotonic()
        for link in self._links:
            reason = link.send(pack(self._beacon(link.number)))
            link.lost_count += 1
            if (reason or link.lost_count > OWN_LOST_MAX) and not link.is_blocked:
                link.is_blocked = True
                self._tell(MulticastBlocked(link.interface, reason))
        self._sent_s = now_s
        self._due_s = now_s + (self._eager.pop(0) if self._eager else PERIOD_S)
        for sender in [each for each, known in self._senders.items() if now_s - known.heard_s > FORGOTTEN_S]:
            del self._senders[sender]

    def _beacon(self, link: int) -> Beacon:
        return Beacon(
            protocol=MESH_PROTOCOL,
            cluster=self._cluster,
            sender=self._sender,
            port=self._port,
            node_count=self.node_count,
            link=link,
        )

    # ---- reading ----

    def _read(self, receiver: socket.socket) -> None:
        now_s = time.monotonic()
        if now_s - self._read_s >= 1.0:
            self._read_s, self._read_count = now_s, 0
        self._read_count += 1
        if self._read_count > READ_PER_S_MAX:
            time.sleep(max(0.0, 1.0 - (now_s - self._read_s)))  # the system's buffer is small, and drops the rest
        try:
            data, origin = receiver.recvfrom(BEACON_BYTES_MAX + 1)
        except OSError:  # the interface went away; what it means shows by what does not come back
            return
        beacon = parse(data)
        if beacon is None:
            return
        if beacon.sender == self._sender:
            self._hear_own(beacon.link)
        else:
            self._hear(now_s, beacon, str(origin[0]).partition("%")[0])

    def _hear_own(self, number: int) -> None:
        for link in self._links:
            if link.number == number:
                link.lost_count = 0
                if link.is_blocked:
                    link.is_blocked = False
                    self._tell(MulticastWorks(link.interface))

    def _hear(self, now_s: float, beacon: Beacon, address: str) -> None:
        known = self._senders.get(beacon.sender)
        if known is None:
            if len(self._senders) >= SENDERS_MAX:
                return
            known = self._senders[beacon.sender] = _Sender(now_s, {})
            self._due_s = min(self._due_s, max(now_s, self._sent_s + ANSWER_SPACING_S))
        known.heard_s = now_s
        if now_s - known.told_s.get(address, -TOLD_SPACING_S) < TOLD_SPACING_S:
            return
        if len(known.told_s) < SENDERS_MAX:
            known.told_s[address] = now_s
        is_linked = beacon.cluster == self._cluster and self._is_linked(beacon.sender)
        is_ours_to_dial = (self.node_count, self._sender) < (beacon.node_count, beacon.sender)
        self._tell(BeaconHeard(beacon, address, is_linked, is_ours_to_dial))


# ---- sockets ----


def _receivers(links: Sequence[_Link]) -> list[socket.socket]:
    """One for each family, a member of the group on the interfaces of all links."""
    families = {
        socket.AF_INET: [link for link in links if ":" not in link.address],
        socket.AF_INET6: [link for link in links if ":" in link.address],
    }
    return [_receiver(family, members) for family, members in families.items() if members]


def _receiver(family: socket.AddressFamily, links: Sequence[_Link]) -> socket.socket:
    group = GROUP_4 if family == socket.AF_INET else GROUP_6
    receiver = multicast.receiver(group, PORT)
    for link in links:
        try:
            multicast.join(receiver, group, link.interface, link.address)
        except OSError:  # a membership that is there already, or can't be had, shows by what does not come back
            link.lost_count = OWN_LOST_MAX
    return receiver
