"""What a mesh process is told at its start: where to listen, whom to connect to, and what to show."""

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from covey.effects.endpoints import AddressError, endpoint, peer_address
from covey.effects.interfaces import Place, is_loopback
from covey.schema.ids import NodeId
from covey.schema.mesh import BeaconSetup, MeshSetup, MeshTls
from covey.schema.trust import Credentials

EVERYBODY: Final = "every"
ONE: Final = "to"


class MeshError(Exception):
    """The mesh can't be as it was asked for; the message is one sentence for a person."""


class MeshSettings(Struct, frozen=True, kw_only=True):
    credentials: Credentials
    port: int = 0  # taken if it is free, else any
    peers: tuple[str, ...] = ()  # as people write them: HOST or HOST:PORT, the port of that node's API
    interfaces: tuple[str, ...] = ()  # names or addresses; empty: all private addresses


def peers_of(settings: MeshSettings) -> list[tuple[str, int]]:
    """(host, mesh port) of each. Raises `MeshError`."""
    try:
        return [peer_address(written) for written in settings.peers]
    except AddressError as error:
        raise MeshError(str(error)) from None


def mesh_setup(node_id: NodeId, settings: MeshSettings, places: Sequence[Place], dials: Sequence[str]) -> MeshSetup:
    """`places`: the usable addresses of this machine; `dials`: endpoints that were found by beacon."""
    credentials = settings.credentials
    named = [endpoint(host, port) for host, port in peers_of(settings)]
    addresses = tuple(dict.fromkeys(address for _, address in places))
    return MeshSetup(
        namespace=f"covey/{credentials.cluster_id}",
        subscriptions=(f"{EVERYBODY}/*", f"{ONE}/{node_id}/*"),
        addresses=addresses,
        port=settings.port,
        connect=tuple(dict.fromkeys([*named, *dials])),
        scouting_group=credentials.scouting_group,
        scouting_port=credentials.scouting_port,
        scouting_interfaces=tuple(address for address in addresses if ":" not in address),
        tls=MeshTls(credentials.authority, credentials.certificate, credentials.private_key),
        beacon=BeaconSetup(credentials.cluster_id, tuple(place for place in places if not is_loopback(place[1]))),
    )
