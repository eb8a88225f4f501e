"""Listens for HTTP clients and runs an application for them, until told to stop; the signals stay with the node."""

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Generator
from typing import Any, Final

import uvicorn

from covey.effects.http_protocol import HEAD_BYTES_MAX, BoundedProtocol

BACKLOG: Final = 128
KEEP_ALIVE_S: Final = 5  # silence between two requests of one connection
TICK_S: Final = 1.0
GRACE_S: Final = 2  # for the last words of answers under way when the node ends; `serving` has ended them by then

_log = logging.getLogger("uvicorn.error")


class ListenError(Exception):
    """The address can't be listened at; the message is one sentence for a person."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens already, so that nobody can come between. Port 0: any. Raises `ListenError`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ListenError(f"{host!r} is no address of this machine ({error.strerror}); name one with --host") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # those who left a moment ago don't count
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ListenError(_refusal(host, port, error)) from None
    return listener


def _refusal(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is in use; end the program that listens there, or choose another with --port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is no address of this machine; name one that is with --host"
    return f"{host} port {port} can't be listened at: {error.strerror or error}; choose another with --port"


def port_of(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])


def log_requests() -> None:
    """Lets the access log (`api/guard`) reach standard error: a line per request is nobody's default."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger("covey.access")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # else the node's own log would have each line again


class HttpServer:
    """`application` is ASGI. `serve` runs until `stop`, which gives answers under way a short time to end."""

    def __init__(self, application: Any, listener: socket.socket) -> None:
        self._listener = listener
        self._server = _Server(
            uvicorn.Config(
                application,
                http=BoundedProtocol,
                ws="none",
                h11_max_incomplete_event_size=HEAD_BYTES_MAX,
                timeout_keep_alive=KEEP_ALIVE_S,
                proxy_headers=False,  # whose address counts is `api/guard`'s to say
                lifespan="off",
                log_config=None,
                log_level="error",  # what strangers send is their mistake, and no line in our log
                access_log=False,
                timeout_graceful_shutdown=GRACE_S,
                server_header=False,
            )
        )

    async def serve(self) -> None:
        await self._server.serve(sockets=[self._listener])
        left = self._server.server_state.tasks  # cancelled by now, but not awaited
        if left:
            await asyncio.wait(left, timeout=GRACE_S)
        _log.setLevel(logging.NOTSET)

    def stop(self) -> None:
        """Answers that break from now on break by our own wish, which is nothing to report."""
        _log.setLevel(logging.CRITICAL)
        self._server.should_exit = True
        self._server.stopping.set()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.stopping = asyncio.Event()

    async def main_loop(self) -> None:
        """Once a second it sets the date that answers show. uvicorn's own wakes ten times a second."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), TICK_S)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Captures none: the node ends in an order of its own."""
        yield
