"""Which of this machine's addresses the mesh uses: private ones, that no stranger on the internet can reach."""

import ipaddress
import socket
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network
from typing import Final

import psutil

Place = tuple[str, str]  # (interface, address); an IPv6 address without its scope

PRIVATE: Final = tuple(
    ipaddress.ip_network(network)
    for network in (
        "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16",  # RFC 1918
        "169.254.0.0/16",  # RFC 3927: two machines and a cable
        "100.64.0.0/10",  # RFC 6598: what some VPNs hand out
        "fc00::/7",  # RFC 4193
    )
)  # fmt: skip
LINK_LOCAL_6: Final = ipaddress.ip_network("fe80::/10")  # Zenoh's TLS can't use them: they need a scope
LOOPBACK: Final = "127.0.0.1"


def all_places() -> list[Place]:
    """Of the interfaces that are up and have a carrier."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    return sorted(
        (name, address.address.partition("%")[0])
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if name in up and address.family in {socket.AF_INET, socket.AF_INET6}
    )


def usable(places: Iterable[Place], chosen: Sequence[str]) -> list[Place]:
    """Private addresses, or those that a person chose by name of interface or by address.

    Loopback too if none of them is IPv4: nodes of this machine then find each other by scouting.
    """
    places = list(places)
    if chosen:
        found = [place for place in places if set(place) & set(chosen) and not _is_in(place[1], (LINK_LOCAL_6,))]
    else:
        found = [place for place in places if _is_in(place[1], PRIVATE)]
    if any(":" not in address for _, address in found):
        return found
    return [*found, *(place for place in places if place[1] == LOOPBACK)]


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_near(address: str) -> bool:
    """Whether it is of this machine, of a private network, or of one that this machine is in."""
    return is_loopback(address) or _is_in(address, (*PRIVATE, LINK_LOCAL_6, *_own_networks()))


def _own_networks() -> list[IPv4Network | IPv6Network]:
    own = [each for addresses in psutil.net_if_addrs().values() for each in addresses if each.netmask]
    return [
        ipaddress.ip_network(f"{each.address.partition('%')[0]}/{_length(str(each.netmask))}", strict=False)
        for each in own
        if each.family in {socket.AF_INET, socket.AF_INET6}
    ]


def _length(netmask: str) -> int:
    return int(ipaddress.ip_address(netmask)).bit_count()


def _is_in(address: str, networks: Iterable[IPv4Network | IPv6Network]) -> bool:
    parsed = ipaddress.ip_address(address)
    return any(parsed.version == network.version and parsed in network for network in networks)
