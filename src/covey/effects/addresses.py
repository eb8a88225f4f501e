"""What an address to listen at means for those who connect: "all of this machine" is none to connect to."""

import ipaddress
import socket
from collections.abc import Collection
from typing import Final

from covey.schema.cluster import Hardware

LOOPBACK_OF: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - recognised, not listened at
LINK_LOCAL: Final = "fe80:"  # of no use without the name of an interface, which differs on each machine
LINK_LOCAL_IPV4: Final = "169.254."  # two machines at one cable have nothing else; elsewhere it leads nowhere
# Interfaces of containers and virtual machines, by how their names begin: others can't reach what is at them.
INSIDE: Final = ("docker", "br-", "veth", "virbr", "podman")
# Addresses in documents only (RFC 5737, RFC 3849): the way to them is the default route.
FAR_AWAY: Final = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
ANY_PORT: Final = 9


def is_local(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name
        return False


def is_wildcard(host: str) -> bool:
    """Whether it stands for all addresses of this machine."""
    return host in LOOPBACK_OF


def local_host(host: str) -> str:
    """Where this machine itself reaches what listens at `host`."""
    return LOOPBACK_OF.get(host, host)


def routed_hosts() -> frozenset[str]:
    """The addresses from which this machine speaks with the rest of the world, as its routes say; nothing is sent."""
    return frozenset(found for family, there in FAR_AWAY if (found := _source(family, there)))


def _source(family: socket.AddressFamily, there: str) -> str | None:
    with socket.socket(family, socket.SOCK_DGRAM) as unsent:
        try:
            unsent.connect((there, ANY_PORT))  # of UDP: this chooses a route and no more
        except OSError:  # there is none
            return None
        return str(unsent.getsockname()[0])


def network_hosts(host: str, hardware: Hardware, routed: Collection[str]) -> tuple[str, ...]:
    """Where other machines may reach what listens at `host`; none if only this one can.

    The likeliest first: IPv4, and of each family what is `routed`; last what only few can reach, if anybody.
    """
    if not is_wildcard(host):
        return () if is_local(host) else (host,)
    names = {address: name for name, address in hardware.interfaces}

    def doubt(each: str) -> tuple[bool, bool, bool, str]:
        is_inside = names[each].startswith(INSIDE) or each.startswith(LINK_LOCAL_IPV4)
        return (is_inside and each not in routed, ":" in each, each not in routed, each)

    reachable = [each for each in names if not is_local(each) and not each.startswith(LINK_LOCAL)]
    return tuple(sorted((each for each in reachable if ":" not in each or host == "::"), key=doubt))


def http_url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
