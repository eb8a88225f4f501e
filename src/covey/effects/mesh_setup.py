"""What a mesh process is told at its start: where to listen, whom to connect to, and what to show."""

import hashlib
from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from covey.effects.endpoints import endpoint, peer_address
from covey.effects.interfaces import LOOPBACK, Place, is_loopback
from covey.effects.probe import loopback_interface
from covey.schema.ids import NodeId
from covey.schema.mesh import BeaconSetup, MeshSetup, MeshTls
from covey.schema.trust import Credentials

SCOUTING_GROUP: Final = "224.0.0.224"
SCOUTING_PORT_FIRST: Final = 20000  # below the ranges that systems hand out to outgoing connections
SCOUTING_PORT_COUNT: Final = 10000
EVERYBODY: Final = "every"
ONE: Final = "to"


class MeshError(Exception):
    """The mesh can't be as it was asked for; the message is one sentence for a person."""


class MeshSettings(Struct, frozen=True, kw_only=True):
    """Without credentials the links are not authenticated, so everything stays on the loopback interface."""

    cluster: str  # without credentials it tells clusters of one machine apart
    port: int = 0  # taken if it is free, else any
    peers: tuple[str, ...] = ()  # as people write them: HOST or HOST:PORT, the port of that node's API
    credentials: Credentials | None = None
    interfaces: tuple[str, ...] = ()  # names or addresses; empty: all private addresses


def peers_of(settings: MeshSettings) -> list[tuple[str, int]]:
    """(host, mesh port) of each. Raises `AddressError`, `MeshError`."""
    peers = [peer_address(written) for written in settings.peers]
    for written, (host, _) in zip(settings.peers, peers, strict=True):
        if settings.credentials is None and not is_loopback(host):
            raise MeshError(
                f"{written} is on another machine, and without a join code nodes talk over the loopback interface alone"
            )
    return peers


def mesh_setup(node_id: NodeId, settings: MeshSettings, places: Sequence[Place], dials: Sequence[str]) -> MeshSetup:
    """`places`: the usable addresses of this machine; `dials`: endpoints that were found by beacon."""
    credentials = settings.credentials
    protocol = "tls" if credentials else "tcp"
    named = [endpoint(protocol, host, port) for host, port in peers_of(settings)]
    subscriptions = (f"{EVERYBODY}/*", f"{ONE}/{node_id}/*")
    connect = tuple(dict.fromkeys([*named, *dials]))
    if credentials is None:
        return _local(settings.cluster, settings.port, subscriptions, connect)
    addresses = tuple(dict.fromkeys(address for _, address in places))
    return MeshSetup(
        namespace=f"covey/{credentials.cluster_id}",
        subscriptions=subscriptions,
        addresses=addresses,
        port=settings.port,
        connect=connect,
        scouting_group=credentials.scouting_group,
        scouting_port=credentials.scouting_port,
        scouting_interfaces=tuple(address for address in addresses if ":" not in address),
        tls=MeshTls(credentials.authority, credentials.certificate, credentials.private_key),
        beacon=BeaconSetup(credentials.cluster_id, tuple(place for place in places if place[1] != LOOPBACK)),
    )


def _local(cluster: str, port: int, subscriptions: tuple[str, ...], connect: tuple[str, ...]) -> MeshSetup:
    """The cluster's name decides the multicast port and the prefix of all keys: clusters do not mix."""
    digest = hashlib.sha256(cluster.encode()).digest()
    return MeshSetup(
        namespace=f"covey/{digest.hex()[:16]}",
        subscriptions=subscriptions,
        addresses=(LOOPBACK,),
        port=port,
        connect=connect,
        scouting_group=SCOUTING_GROUP,
        scouting_port=SCOUTING_PORT_FIRST + int.from_bytes(digest[:4], "little") % SCOUTING_PORT_COUNT,
        scouting_interfaces=(loopback_interface(),),
    )
