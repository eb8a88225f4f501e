"""What a node and its mesh process say to each other, in frames of `wire`, and the beacon that strangers may read.

The node starts the process, sends `MeshSetup` first, and ends it by closing its standard input.
"""

from enum import StrEnum
from typing import Final

from msgspec import Struct

MESH_PROTOCOL: Final = 3  # grows when nodes before and after can't understand each other's messages
BEACON_BYTES_MAX: Final = 512
BEACON_MAGIC: Final = b"covey beacon "


class Beacon(Struct, frozen=True, kw_only=True):
    """Sent by every node to one well-known multicast group, in the clear. Whoever reads it trusts nothing in it.

    In MessagePack after `BEACON_MAGIC`. Later versions may add fields; none is ever removed.
    """

    protocol: int  # MESH_PROTOCOL
    cluster: str  # 16 hex digits
    sender: str  # hex digits of the mesh process's Zenoh id, fresh in every life
    port: int  # where it awaits its peers
    node_count: int  # nodes that it sees, itself too
    link: int  # which of its own addresses this was sent from, so that it knows what comes back


class MeshTls(Struct, frozen=True):
    """PEM, as in `Credentials`."""

    authority: bytes
    certificate: bytes
    private_key: bytes


class BeaconSetup(Struct, frozen=True):
    cluster: str
    addresses: tuple[tuple[str, str], ...]  # (interface, address) that beacons are sent from


class MeshSetup(Struct, frozen=True, kw_only=True, tag=True):
    """The first message. Endpoints are Zenoh's: "tls/192.168.1.5:53415"."""

    namespace: str
    subscriptions: tuple[str, ...]
    addresses: tuple[str, ...]  # to listen at
    port: int  # taken if it is free at all of them, else any; 0: any
    connect: tuple[str, ...]
    scouting_group: str
    scouting_port: int
    scouting_interfaces: tuple[str, ...]  # names or IPv4 addresses; empty: no scouting
    tls: MeshTls
    beacon: BeaconSetup


class Urgency(StrEnum):
    BEAT = "beat"  # at once or not at all, before all others
    FRESH = "fresh"  # may wait, and replaces what waits with the same key
    PATIENT = "patient"  # may wait for a slow peer


class Put(Struct, frozen=True, tag=True):
    key: str
    payload: bytes
    urgency: Urgency


class Ping(Struct, frozen=True, tag=True):
    """Answered by `Pong`."""


ToMesh = MeshSetup | Put | Ping


class Opened(Struct, frozen=True, tag=True):
    """The answer to the setup. From now on `Put` is carried out."""

    port: int
    scouts_as_wanted: bool


class OpenFailed(Struct, frozen=True, tag=True):
    reason: str


class Got(Struct, frozen=True, tag=True):
    key: str
    payload: bytes


class Pong(Struct, frozen=True, tag=True):
    """The process lives."""


class Linked(Struct, frozen=True, tag=True):
    """How many peers have a connection now; sent when that changes."""

    count: int


class BeaconHeard(Struct, frozen=True, tag=True):
    """Of another node; at most one in 3 s for each sender and address."""

    beacon: Beacon
    address: str  # it came from; without a scope
    is_linked: bool
    is_ours_to_dial: bool  # of two that find each other so, one dials first


class MulticastBlocked(Struct, frozen=True, tag=True):
    """What was sent from `interface` can't be sent, or never comes back to this machine. Sent once."""

    interface: str
    reason: str


class MulticastWorks(Struct, frozen=True, tag=True):
    """After `MulticastBlocked`: it comes back after all."""

    interface: str


FromMesh = Opened | OpenFailed | Got | Pong | Linked | BeaconHeard | MulticastBlocked | MulticastWorks
