"""How addresses of peers are written: by people, and for Zenoh."""

from typing import Final

API_PORT_DEFAULT: Final = 52415
PORT_OFFSET: Final = 1000  # a node's mesh port is its API port and this: one address to remember
PORT_MAX: Final = 65535
PORT_DIGITS_MAX: Final = 5


class AddressError(Exception):
    """What was written is no address of a peer; the message is one sentence for a person."""


def mesh_port(api_port: int) -> int:
    """Where a node whose API listens at `api_port` awaits its peers. 0 stays 0: any."""
    if not api_port:
        return 0
    return api_port + PORT_OFFSET if api_port + PORT_OFFSET <= PORT_MAX else api_port - PORT_OFFSET


def peer_address(written: str) -> tuple[str, int]:
    """(host, mesh port) of a peer, given as HOST or HOST:PORT with the port of its API. Raises `AddressError`."""
    host, colon, port = written.rpartition(":")
    if not colon or (written.count(":") > 1 and not host.endswith("]")):
        host, port = written, str(API_PORT_DEFAULT)  # no port; an IPv6 address without brackets is all host
    host = host.strip("[]")
    if not _can_be_looked_up(host) or not _is_port(port):
        raise AddressError(f"{written!r} is not the address of a peer; write it as HOST or HOST:PORT")
    return host, mesh_port(int(port))


def _is_port(port: str) -> bool:
    is_number = port.isascii() and port.isdecimal() and len(port) <= PORT_DIGITS_MAX
    return is_number and 0 < int(port) <= PORT_MAX


def _can_be_looked_up(host: str) -> bool:
    """The resolver raises for a label that is empty or has over 63 characters, instead of not finding it."""
    try:
        return bool(host.encode("idna"))
    except UnicodeError:
        return False


def endpoint(host: str, port: int) -> str:
    """Zenoh's name for an address. With TLS it takes an IPv6 address only without the usual brackets."""
    return f"tls/{host}:{port}"
