"""Sockets that send to a multicast group and hear it. An address with a colon is of IPv6, and so is its group."""

import socket
import sys
from collections.abc import Callable
from functools import partial


def sender(interface: str, address: str) -> socket.socket:
    """Sends from `address` through `interface`, to this machine too. Raises `OSError`."""
    return _made(socket.AF_INET6 if ":" in address else socket.AF_INET, partial(_set_sender, interface, address))


def receiver(group: str, port: int) -> socket.socket:
    """Listens at the port, beside others of this machine that do; `join` makes it hear. Raises `OSError`."""
    return _made(socket.AF_INET6 if ":" in group else socket.AF_INET, partial(_set_receiver, group, port))


def _made(family: socket.AddressFamily, set_up: Callable[[socket.socket], None]) -> socket.socket:
    made = socket.socket(family, socket.SOCK_DGRAM)
    try:
        set_up(made)
    except OSError:
        made.close()
        raise
    return made


def _set_sender(interface: str, address: str, made: socket.socket) -> None:
    if ":" in address:
        index = socket.if_nametoindex(interface)
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_LOOP, 1)
        made.bind((address, 0, 0, index))
    else:
        made.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(address))
        made.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
        made.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 1)
        made.bind((address, 0))
    made.settimeout(0)


def _set_receiver(group: str, port: int, made: socket.socket) -> None:
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sys.platform == "darwin":  # where several nodes of one machine share the port only so
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if ":" in group:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    made.bind(("" if ":" in group else group, port))


def join(hearing: socket.socket, group: str, interface: str, address: str) -> None:
    """From now on `hearing` gets what comes for the group at this interface. Raises `OSError`."""
    if ":" in group:
        member = socket.inet_pton(socket.AF_INET6, group) + _index(interface)
        hearing.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, member)
    else:
        member = socket.inet_aton(group) + socket.inet_aton(address)
        hearing.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)


def _index(interface: str) -> bytes:
    return socket.if_nametoindex(interface).to_bytes(4, sys.byteorder)
