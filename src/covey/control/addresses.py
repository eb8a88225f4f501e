"""At which addresses a node reaches a listener of another one, in the order to be tried.

A node's report names all its addresses, and nobody says which of them the other side can reach. Whoever answers is
known by its certificate, so a wrong address costs time and nothing else: same machine first, then same network.
"""

import ipaddress
from typing import Final

from covey.schema.cluster import Hardware, NodeReport
from covey.schema.runner import EVERYWHERE, Address

LOOPBACK: Final = "127.0.0.1"
PORT_MAX: Final = 65535
ADDRESSES_MAX: Final = 8  # each may take its full time limit
LOCAL_NETWORK_BITS: Final = {4: 24, 6: 64}  # what networks at home share; reports have no netmasks

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


def ways_to(listener: Address | None, there: NodeReport | None, here: NodeReport | None) -> tuple[Address, ...]:
    """How the node of the report `here` reaches `listener`, which the node of `there` reports."""
    if listener is None or not 0 < listener.port <= PORT_MAX:
        return ()
    if listener.host != EVERYWHERE:
        return (listener,)
    hosts = _hosts(there, here) if there and here and there.node_id != here.node_id else [LOOPBACK]
    return tuple(Address(host, listener.port) for host in hosts[:ADDRESSES_MAX])


def _hosts(there: NodeReport, here: NodeReport) -> list[str]:
    theirs, ours = _usable(there.hardware), _usable(here.hardware)
    away = [each for each in theirs if each not in ours]  # what both have, as Docker's bridge, leads back to ourselves
    away.sort(key=lambda address: -max((_closeness(address, own) for own in ours), default=0))
    same = there.hardware and here.hardware and there.hardware.machine_id == here.hardware.machine_id
    return [*([LOOPBACK] if same else []), *map(str, away)]


def _usable(hardware: Hardware | None) -> list[IpAddress]:
    """Without those that mean something on one machine only: loopback, and IPv6's link-local ones."""
    found = [_parsed(address) for _, address in hardware.interfaces] if hardware else []
    return [each for each in found if each and not (each.is_loopback or (each.version == 6 and each.is_link_local))]  # noqa: PLR2004 - IP versions


def _parsed(address: str) -> IpAddress | None:
    """None for what is no address, whoever reports it."""
    try:
        return ipaddress.ip_address(address)
    except ValueError:
        return None


def _closeness(address: IpAddress, own: IpAddress) -> int:
    """Bits that both begin with, on one scale for both versions of IP; 0 across them."""
    if address.version != own.version:
        return 0
    equal = address.max_prefixlen - (int(address) ^ int(own)).bit_length()
    return equal * LOCAL_NETWORK_BITS[10 - address.version]
