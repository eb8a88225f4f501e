"""One HTTP connection, within bounds: uvicorn's own protocol, plus the limits that it leaves to a proxy in front.

Nobody can hold a connection without using it. A request's head must come within `HEAD_S_MAX`, drip by drip or not; what
waits to be read must move at `RATE_BYTES_MIN` per `STALL_S`; and only so many connections are open at once. What a
request may do once its head is read is the application's to bound (`api/answers.py`: bodies).
"""

import asyncio
import json
import resource
import socket
import sys
from http import HTTPStatus
from typing import Final

from h11 import RemoteProtocolError
from uvicorn.protocols.http.h11_impl import H11Protocol

from covey.api.errors import render_error

HEAD_S_MAX: Final = 10.0  # from the connection, or the end of the last answer, to the end of the next request's head
HEAD_BYTES_MAX: Final = 16 * 1024
STALL_S: Final = 30.0
RATE_BYTES_MIN: Final = 16 * 1024  # in `STALL_S`: half of the oldest modem
SEND_BUFFER_BYTES: Final = 256 * 1024  # the kernel's part, else megabytes; and what moves is seen to move
CONNECTIONS_MAX: Final = 512
FILES_FOR_OTHERS: Final = 128  # of this process' open files: runners, mesh, logs, models


def connections_max() -> int:
    """As many as this process may open, and no more than anybody needs."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CONNECTIONS_MAX if soft == resource.RLIM_INFINITY else max(16, min(CONNECTIONS_MAX, soft - FILES_FOR_OTHERS))


class BoundedProtocol(H11Protocol):
    """Relies on uvicorn's `cycle`, `connections`, `on_response_complete` and `send_400_response`, as tests see to."""

    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), "TCP"
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        if len(self.connections) > connections_max():
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "Too many connections are open; try again later.")
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    # ---- requests that do not come ----

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_head()

    def _await_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = self.loop.call_later(HEAD_S_MAX, self._end_if_idle)

    def _end_if_idle(self) -> None:
        """What has been answered and is still being read is `_end_if_stalled`'s."""
        is_idle = self.cycle is None or self.cycle.response_complete  # pyright: ignore[reportUnnecessaryComparison]
        if is_idle and self._stall_timer is None:
            self.transport.abort()

    # ---- answers that are not read ----

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
            self._await_head()

    def _await_reader(self) -> None:
        waiting = self.transport.get_write_buffer_size()
        self._stall_timer = self.loop.call_later(STALL_S, self._end_if_stalled, waiting)

    def _end_if_stalled(self, waited: int) -> None:
        if waited - self.transport.get_write_buffer_size() < RATE_BYTES_MIN:
            self.transport.abort()  # its request hears of the end, and ends
        else:
            self._await_reader()

    # ---- requests that are none ----

    def send_400_response(self, msg: str) -> None:
        """Called while the parser's error is handled, which knows its status. The same envelope as all errors."""
        error = sys.exception()
        status = (
            HTTPStatus(error.error_status_hint) if isinstance(error, RemoteProtocolError) else HTTPStatus.BAD_REQUEST
        )
        if status is HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            msg = f"The headers are larger than the limit of {HEAD_BYTES_MAX} bytes."
        self._refuse(status, msg)

    def _refuse(self, status: HTTPStatus, sentence: str) -> None:
        """Unless an answer is under way, which then breaks off."""
        if self.cycle is None or self.cycle.response_complete:  # pyright: ignore[reportUnnecessaryComparison]
            self.transport.write(_plain_answer(status, sentence))
        self.transport.close()


def _plain_answer(status: HTTPStatus, sentence: str) -> bytes:
    body = json.dumps(render_error(sentence, status)).encode()
    head = f"HTTP/1.1 {int(status)} {status.phrase}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
