"""Those who have connected to a data port and not yet shown who they are: bounded in number, place and time.

When there are too many, the one that waits longest is sent away. A member shows its certificate within milliseconds,
so it comes through even while somebody opens connections as fast as they can and says nothing on them.
"""

import contextlib
import ipaddress
import logging
import socket
import threading
from collections.abc import Generator
from typing import Final

STRANGERS_MAX: Final = 32  # at once; each costs a thread and a socket for as long as a hello may take
NEAR_BITS: Final = {4: 24, 6: 64}  # of an address: those that agree in so many are on one network

log = logging.getLogger(__name__)


class Strangers:
    def __init__(self) -> None:
        self._waiting: list[socket.socket] = []  # the longest first
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def hosted(self, connection: socket.socket) -> Generator[None]:
        """The connection counts as a stranger's until the block ends, and may be shut down meanwhile."""
        with self._lock:
            self._waiting.append(connection)
            if len(self._waiting) > STRANGERS_MAX:
                log.warning("many connect and don't say who they are; one that waited is sent away")
                _shut(self._waiting.pop(0))
        try:
            yield
        finally:
            with self._lock:
                if connection in self._waiting:
                    self._waiting.remove(connection)


def is_near(connection: socket.socket) -> bool:
    """Whether it came at an address that is not the internet's, or from the same network: IPv6 gives every device at
    home an address of the internet's. Raises `OSError`.
    """
    own, other = (_address(name[0]) for name in (connection.getsockname(), connection.getpeername()))
    if not own.is_global:
        return True
    distance = (int(own) ^ int(other)).bit_length() if own.version == other.version else own.max_prefixlen
    return own.max_prefixlen - distance >= NEAR_BITS[own.version]


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """IPv4 arrives in the clothes of IPv6 where one socket listens for both."""
    address = ipaddress.ip_address(text.partition("%")[0])
    return (address.ipv4_mapped or address) if isinstance(address, ipaddress.IPv6Address) else address


def _shut(connection: socket.socket) -> None:
    """Its thread wakes up and closes it."""
    with contextlib.suppress(OSError):  # it has left by itself
        connection.shutdown(socket.SHUT_RDWR)
