"""Connections to the heads of instances: one for each head, shared by all requests of this node that it runs.

A request is a `HeadStream`: what the head says about it, in order, until the connection is lost. Leaving the stream
before the head has ended the request cancels it there; that takes no waiting, so it works while being cancelled too.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Final

import msgspec

from covey.schema.generation import Admit, Broken, Cancel, Ended, HeadEvent, ServeHello
from covey.schema.ids import InstanceId, RequestId
from covey.schema.runner import Address
from covey.schema.wire import FrameBuffer, FrameTooLargeError, pack

CONNECT_S_MAX: Final = 5.0
READ_BYTES: Final = 64 * 1024

Key = tuple[InstanceId, Address]
_decoder = msgspec.msgpack.Decoder(HeadEvent)
_log = logging.getLogger(__name__)


class HeadLostError(Exception):
    """The head can't be reached, or the connection to it ended. The message is one sentence."""


class HeadConnection:
    """One TCP connection. `read` must run for as long as it is used."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str) -> None:
        self._reader = reader
        self._writer = writer
        self._name = name
        self._inboxes: dict[RequestId, asyncio.Queue[HeadEvent | HeadLostError]] = {}
        self.lost = False

    @contextlib.asynccontextmanager
    async def admitted(self, admit: Admit) -> AsyncGenerator["HeadStream"]:
        """Sends the request, and cancels it on leaving if it has not ended. Raises `HeadLostError`."""
        if self.lost:
            raise HeadLostError(f"The connection to {self._name} is lost.")
        # It needs no bound: a head sends one event for each token of a request whose length is limited.
        inbox = self._inboxes[admit.request_id] = asyncio.Queue()
        stream = HeadStream(inbox)
        self._writer.write(pack(admit))
        try:
            yield stream
        finally:
            del self._inboxes[admit.request_id]
            if not stream.ended and not self.lost:
                self._writer.write(pack(Cancel(admit.request_id, admit.attempt)))

    async def read(self) -> None:
        """Gives each request its events until the connection ends; then tells all that are left."""
        reason = "ended"
        frames = FrameBuffer()
        try:
            while data := await self._reader.read(READ_BYTES):
                for body in frames.feed(data):
                    self._deliver(_decoder.decode(body))
        except (OSError, msgspec.MsgspecError, FrameTooLargeError) as error:
            reason = f"broke: {error}"
        finally:
            self._lose(HeadLostError(f"The connection to {self._name} {reason}."))

    def _deliver(self, event: HeadEvent) -> None:
        inbox = self._inboxes.get(event.request_id)
        if inbox is not None:  # else the request was left, and its cancellation is on its way
            inbox.put_nowait(event)

    def _lose(self, error: HeadLostError) -> None:
        _log.info("%s", error)
        self.lost = True
        for inbox in self._inboxes.values():
            inbox.put_nowait(error)
        self._writer.close()


class HeadStream:
    """The events of one request."""

    def __init__(self, inbox: "asyncio.Queue[HeadEvent | HeadLostError]") -> None:
        self._inbox = inbox
        self.ended = False

    async def next(self) -> HeadEvent:
        """Raises `HeadLostError`."""
        event = await self._inbox.get()
        if isinstance(event, HeadLostError):
            raise event
        self.ended = isinstance(event, Ended | Broken)
        return event


class Heads:
    """The connections that are open. `start` runs a connection's reader beside everything else."""

    def __init__(self, start: Callable[[HeadConnection], None]) -> None:
        self._start = start
        self._open: dict[Key, HeadConnection] = {}
        self._opening: dict[Key, asyncio.Lock] = {}

    async def connect(self, instance_id: InstanceId, address: Address) -> HeadConnection:
        """The connection to a head, opened if there is none. Raises `HeadLostError`."""
        key = (instance_id, address)
        async with self._opening.setdefault(key, asyncio.Lock()):
            self._forget_lost(key)
            if key not in self._open:
                self._open[key] = await open_connection(instance_id, address)
                self._start(self._open[key])
            return self._open[key]

    def _forget_lost(self, current: Key) -> None:
        for key in [key for key, connection in self._open.items() if connection.lost]:
            del self._open[key]
            if key != current:
                self._opening.pop(key, None)


async def open_connection(instance_id: InstanceId, address: Address) -> HeadConnection:
    """Raises `HeadLostError`."""
    name = f"the head at {address.host}:{address.port}"
    try:
        async with asyncio.timeout(CONNECT_S_MAX):
            reader, writer = await asyncio.open_connection(address.host, address.port)
    except TimeoutError:
        raise HeadLostError(f"{name.capitalize()} did not answer within {CONNECT_S_MAX:.0f} s.") from None
    except OSError as error:
        raise HeadLostError(f"{name.capitalize()} can't be reached: {error.strerror or error}.") from None
    writer.write(pack(ServeHello(instance_id)))
    return HeadConnection(reader, writer, name)
