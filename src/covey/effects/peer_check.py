"""Why a peer that a person named is not reached: asked of the network directly, since Zenoh keeps it to itself."""

import asyncio
import ssl
from collections.abc import Sequence
from typing import Final

import anyio

CONNECT_S_MAX: Final = 4.0


async def examine(peers: Sequence[tuple[str, int]], authority: bytes) -> tuple[str, ...]:
    """One sentence for each (host, mesh port) that something is wrong with."""
    context = _context(authority)
    found = [await _examine(host, port, context) for host, port in peers]
    return tuple(sentence for sentence in found if sentence)


def _context(authority: bytes) -> ssl.SSLContext:
    """Trusts our cluster alone. Names are not compared with addresses, which change."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=authority.decode())
    return context


async def _examine(host: str, port: int, context: ssl.SSLContext) -> str:
    """The handshake shows us the peer's certificate before it asks for ours."""
    try:
        with anyio.fail_after(CONNECT_S_MAX):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
            writer.transport.abort()
    except ssl.SSLCertVerificationError:
        return f"the node at {host} belongs to another cluster: its join code differs; see `covey join-code` there"
    except TimeoutError:
        return f"the peer {host} does not answer at TCP port {port}; is it on, and does its firewall allow the port?"
    except ssl.SSLError:
        return f"at {host}, TCP port {port}, answers something that is no node with a join code"
    except UnicodeError:  # of the codec for names (IDNA), before anybody is asked
        return f"the peer {host} is not looked up: no host can have that name"
    except OSError as error:
        return f"the peer {host} is not reached at TCP port {port} ({error.strerror or error}); is Covey up there?"
    return ""
