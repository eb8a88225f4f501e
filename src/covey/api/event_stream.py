"""Sends a stream of events to one HTTP client over ASGI, framework unseen.

Three things run beside one another, in one task group: the events are sent as they come; silence is filled with
keep-alives; and a client that goes away ends the rest. An event that is a refusal becomes a plain error answer, as
long as nothing has been sent: so what is wrong with a request has its HTTP status, streamed or not.
"""

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, MutableMapping
from contextlib import aclosing
from typing import Any, Generic, TypeVar

import anyio

from covey.api import sse
from covey.api.errors import RequestError

FIRST_EVENT_S_MAX = 1.0  # a client that waits longer for the first event is told that the stream has begun
SILENCE_S_MAX = 10.0

Event = TypeVar("Event")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # proxies in front must not hold tokens back
]

_log = logging.getLogger(__name__)


async def wait_disconnected(receive: Receive) -> None:
    """Returns when the client is gone. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Generic[Event]):
    """One answer. `render` gives the bytes of an event; `refusal` says whether an event refuses the request; `failure`
    gives the last bytes of a stream that ends by a mistake of ours.
    """

    def __init__(
        self,
        events: AsyncGenerator[Event, None],
        render: Callable[[Event], Iterable[bytes]],
        refusal: Callable[[Event], RequestError | None] = lambda _: None,
        failure: Callable[[RequestError], bytes] = lambda error: sse.failure(error) + sse.DONE,
    ) -> None:
        self._events = events
        self._render = render
        self._refusal = refusal
        self._failure = failure
        self._begun = False
        self._lock = anyio.Lock(fast_acquire=True)  # but for keep-alives nobody else wants it
        self._sent_at = anyio.current_time()

    async def run(self, receive: Receive, send: Send) -> RequestError | None:
        """Until the last event or the client's end. Returns the error that is to be answered instead, if any."""
        refused: RequestError | None = None
        async with anyio.create_task_group() as group:
            group.start_soon(self._end_with_client, receive, group.cancel_scope)
            group.start_soon(self._fill_silence, send)
            refused = await self._send_events(send)
            group.cancel_scope.cancel()
        return refused

    async def _end_with_client(self, receive: Receive, scope: anyio.CancelScope) -> None:
        await wait_disconnected(receive)
        scope.cancel()

    async def _fill_silence(self, send: Send) -> None:
        await anyio.sleep(FIRST_EVENT_S_MAX)
        await self._write(send, b"")
        while True:
            await anyio.sleep_until(self._sent_at + SILENCE_S_MAX)
            if anyio.current_time() >= self._sent_at + SILENCE_S_MAX:
                await self._write(send, sse.KEEP_ALIVE)

    async def _send_events(self, send: Send) -> RequestError | None:
        try:
            async with aclosing(self._events) as events:
                async for event in events:
                    refused = self._refusal(event)
                    if refused and not self._begun:
                        return refused
                    await self._write(send, b"".join(self._render(event)))
        except Exception:  # noqa: BLE001 - the top of this answer's task; the client must hear of it, and the log
            _log.exception("An event stream ended by a mistake of ours.")
            failure = RequestError("Something went wrong on this node; its log says what.", status=500)
            if not self._begun:
                return failure
            await self._write(send, self._failure(failure))
        await self._write(send, b"", more=False)
        return None

    async def _write(self, send: Send, body: bytes, *, more: bool = True) -> None:
        """The first call begins the answer, with a keep-alive, whatever `body` holds."""
        async with self._lock:
            if not self._begun:
                self._begun = True
                await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                body = sse.KEEP_ALIVE + body
            if body or not more:
                await send({"type": "http.response.body", "body": body, "more_body": more})
                self._sent_at = anyio.current_time()
