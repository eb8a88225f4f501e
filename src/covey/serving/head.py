"""Connections to the heads of instances: one for each head, shared by all requests of this node that it runs.

A request is a `HeadStream`: what the head says about it, in order, until the connection is lost. Leaving the stream
before the head has ended the request cancels it there; that takes no waiting, so it works while being cancelled too.
"""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncGenerator, Callable, Coroutine
from functools import partial
from typing import Any, Final

import anyio
import msgspec
from msgspec import Struct

from covey.engine.link import tune
from covey.engine.tls import PeerError, client_context, explain, peer_of
from covey.schema.generation import (
    Admit,
    Alive,
    Broken,
    Cancel,
    Ended,
    HeadEvent,
    HeadMessage,
    ProveAlive,
    ServeHello,
)
from covey.schema.ids import InstanceId, NodeId, RequestId
from covey.schema.runner import Address
from covey.schema.trust import Credentials
from covey.schema.wire import FrameBuffer, FrameTooLargeError, pack

CONNECT_S_MAX: Final = 5.0  # for all addresses together
REACH_S_MAX: Final = 2.0  # one address that swallows packets leaves time for the next
SEND_S_MAX: Final = 10.0  # one prompt, over a slow link
READ_BYTES: Final = 64 * 1024
ALIVE_S_MIN: Final = 0.01  # between two proofs, whatever a head asks for

Reader = Callable[[], Coroutine[Any, Any, None]]

_decoder = msgspec.msgpack.Decoder(HeadMessage)
_log = logging.getLogger(__name__)


class HeadLostError(Exception):
    """The head can't be reached, or the connection to it ended. The message is one sentence."""


class HeadPlace(Struct, frozen=True):
    """Where the head of an instance is reached: at one of `addresses`, which come in the order to be tried."""

    instance_id: InstanceId
    node_id: NodeId
    addresses: tuple[Address, ...]


class HeadConnection:
    """One connection. `live` must run for as long as it is used."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str) -> None:
        self._reader = reader
        self._writer = writer
        self._name = name
        self._inboxes: dict[RequestId, asyncio.Queue[HeadEvent | HeadLostError]] = {}
        self._alive_every_s: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self.lost = False

    @contextlib.asynccontextmanager
    async def admitted(self, admit: Admit) -> AsyncGenerator["HeadStream"]:
        """Sends the request, and cancels it on leaving if it has not ended. Raises `HeadLostError`."""
        if self.lost:
            raise HeadLostError(f"The connection to {self._name} is lost.")
        # It needs no bound: a head sends one event for each token of a request whose length is limited.
        inbox = self._inboxes[admit.request_id] = asyncio.Queue()
        stream = HeadStream(inbox, admit.attempt)
        try:
            await self._send(admit)
            yield stream
        finally:
            del self._inboxes[admit.request_id]
            if not stream.ended and not self.lost:
                self._writer.write(pack(Cancel(admit.request_id, admit.attempt)))

    async def _send(self, admit: Admit) -> None:
        """Prompts must not pile up before a head that reads nothing. Raises `HeadLostError`."""
        try:
            self._writer.write(pack(admit))
            async with asyncio.timeout(SEND_S_MAX):
                await self._writer.drain()
        except OSError as error:  # a TimeoutError is one
            raise HeadLostError(f"{_capital(self._name)} takes no requests: {explain(error)}.") from None

    async def live(self) -> None:
        """Until the connection ends."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._prove_alive)
            await self._read()
            tasks.cancel_scope.cancel()

    async def _prove_alive(self) -> None:
        """As often as the head asks; one of an older version does not.

        In a task of its own beside the one that reads: so it goes on while clients read slowly and while prompts are
        rendered and tokenised, which other threads do, and stops where nobody would read what the head says.
        """
        every_s = await self._alive_every_s
        while not self.lost:
            self._writer.write(pack(Alive()))
            await asyncio.sleep(every_s)

    async def _read(self) -> None:
        """Gives each request its events until the connection ends; then tells all that are left."""
        reason = "ended"
        frames = FrameBuffer()
        try:
            while data := await self._reader.read(READ_BYTES):
                for body in frames.feed(data):
                    self._deliver(_decoder.decode(body))
        except (OSError, msgspec.MsgspecError, FrameTooLargeError) as error:
            reason = f"broke: {explain(error)}"
        finally:
            self._lose(HeadLostError(f"The connection to {self._name} {reason}."))

    def _deliver(self, event: HeadMessage) -> None:
        if isinstance(event, ProveAlive):
            if not self._alive_every_s.done():
                self._alive_every_s.set_result(max(event.every_ms / 1000, ALIVE_S_MIN))
            return
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
    """The events of one attempt at a request; what is left over from an earlier one is not listened to."""

    def __init__(self, inbox: "asyncio.Queue[HeadEvent | HeadLostError]", attempt: int) -> None:
        self._inbox = inbox
        self._attempt = attempt
        self.ended = False

    async def next(self) -> HeadEvent:
        """Raises `HeadLostError`."""
        while True:
            event = await self._inbox.get()
            if isinstance(event, HeadLostError):
                raise event
            if event.attempt == self._attempt:
                self.ended = isinstance(event, Ended | Broken)
                return event


class Heads:
    """The connections that are open. `start` runs something beside everything else, until the node ends."""

    def __init__(self, credentials: Credentials, start: Callable[[Reader], None]) -> None:
        self._context = client_context(credentials)
        self._start = start
        self._open: dict[HeadPlace, HeadConnection] = {}
        self._opening: dict[HeadPlace, asyncio.Future[HeadConnection]] = {}

    async def connect(self, place: HeadPlace) -> HeadConnection:
        """The connection to a head, opened if there is none: once, for all who wait. Raises `HeadLostError`."""
        self._open = {each: connection for each, connection in self._open.items() if not connection.lost}
        if place in self._open:
            return self._open[place]
        if place not in self._opening:
            opening = self._opening[place] = asyncio.get_running_loop().create_future()
            self._start(partial(self._hold, place, opening))
        return await asyncio.shield(self._opening[place])

    async def _hold(self, place: HeadPlace, opening: "asyncio.Future[HeadConnection]") -> None:
        """Opens a connection and keeps it to its end."""
        try:
            connection = self._open[place] = await open_connection(place, self._context)
            opening.set_result(connection)
        except HeadLostError as lost:
            opening.set_exception(lost)
            opening.exception()  # seen, even where all who waited have left
            return
        except Exception as error:  # noqa: BLE001 (the top of this task: what a member reports must not end the node)
            _log.exception("the head at %s was not connected to", place.addresses)
            opening.set_exception(HeadLostError(f"The head can't be reached: {error}."))
            opening.exception()
            return
        finally:
            opening.cancel()  # unless it is done: the node ends
            del self._opening[place]
        await connection.live()


async def open_connection(place: HeadPlace, context: ssl.SSLContext) -> HeadConnection:
    """Raises `HeadLostError`."""
    failures: list[str] = []
    try:
        async with asyncio.timeout(CONNECT_S_MAX):
            for address in place.addresses:
                try:
                    return await _open_at(address, place, context)
                except (OSError, ValueError, OverflowError) as error:  # no host or port may look like that
                    failures.append(f"{_name(address)} can't be reached: {explain(error)}")
    except TimeoutError:
        failures.append(f"the rest did not answer within {CONNECT_S_MAX:.0f} s")
    raise HeadLostError(f"{_capital('; '.join(failures) or 'the head has no address that this node can reach')}.")


async def _open_at(address: Address, place: HeadPlace, context: ssl.SSLContext) -> HeadConnection:
    """Raises `OSError`."""
    async with asyncio.timeout(REACH_S_MAX):
        reader, writer = await asyncio.open_connection(address.host, address.port, ssl=context, server_hostname="")
    try:
        peer_of(writer.get_extra_info("ssl_object"), place.node_id)
    except PeerError:
        writer.transport.abort()
        raise
    tune(writer.get_extra_info("socket"))
    writer.write(pack(ServeHello(place.instance_id, can_prove_alive=True)))
    return HeadConnection(reader, writer, _name(address))


def _name(address: Address) -> str:
    return f"the head at {address.host}:{address.port}"


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
