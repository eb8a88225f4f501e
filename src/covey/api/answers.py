"""How this API answers, whatever was asked: JSON, streams, errors in one envelope; and how it reads a body.

With the routes, this is what knows the web framework.
"""

import hashlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping
from typing import Any, Final

import anyio
import msgspec
from fastapi import Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from covey.api.body import BODIES_BYTES_MAX, BODY_BYTES_MAX, BODY_S_MAX
from covey.api.errors import RequestError, render_error
from covey.api.event_stream import Event, EventStream

RETRY_AFTER_S: Final = 5  # a model that loads, or a queue that is full, may be ready by then
NO_STORE: Final = {"Cache-Control": "no-store"}  # nobody's disk is to keep what changes every second


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")


# ---- errors ----


def error_response(error: RequestError) -> Response:
    headers = dict(error.headers)
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    body = render_error(error.message, error.status, error.param, error.code)
    return json_response(body, error.status, headers)


async def refused(_: Request, error: RequestError) -> Response:
    return error_response(error)


async def unrouted(request: Request, error: HTTPException) -> Response:
    sentence = f"{error.detail}: {request.method} {request.url.path}. GET /openapi.json lists the routes."
    return json_response(render_error(sentence, error.status_code), error.status_code, error.headers)


async def gone(_: Request, __: ClientDisconnect) -> Response:
    return Response(status_code=400)  # nobody reads it: the client went away


async def crashed(_: Request, __: Exception) -> Response:
    return error_response(RequestError("Something went wrong on this node; its log says what.", status=500))


ERROR_HANDLERS: Final[dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]]] = {
    RequestError: refused,
    HTTPException: unrouted,
    ClientDisconnect: gone,
    Exception: crashed,
}


# ---- streams ----


class StreamResponse(Response):
    """An `EventStream` as the framework's kind of answer."""

    def __init__(self, stream: EventStream[Any]) -> None:
        super().__init__()
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = await self._stream.run(receive, send)
        if refused is not None:
            await error_response(refused)(scope, receive, send)


def stream(events: AsyncGenerator[Event, None], render: Callable[[Event], Iterable[bytes]]) -> Response:
    return StreamResponse(EventStream(events, render))


# ---- what was there before ----


def revalidated(request: Request, value: Any, stable: Any) -> Response:
    """`value`, or 304 if the client has it already; the ETag is made of `stable`, the part of it that matters."""
    tag = f'"{hashlib.sha256(msgspec.json.encode(stable)).hexdigest()[:32]}"'
    headers = {**NO_STORE, "ETag": f"W/{tag}"}
    known = [each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")]
    if tag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return json_response(value, headers=headers)


# ---- bodies ----


class BodyReader:
    """Reads requests' bodies: each within a size and a time, all that are under way within a size."""

    def __init__(self) -> None:
        self._bytes_held = 0

    async def read(self, request: Request) -> bytes:
        """Raises `RequestError`: 413 as soon as a body is known to be too large, 408 too slow, 503 too many."""
        refuse_declared(request)
        body = bytearray()
        try:
            with anyio.fail_after(BODY_S_MAX):
                async for chunk in request.stream():
                    body += chunk
                    self._bytes_held += len(chunk)
                    self._check(body)
        except TimeoutError:
            raise RequestError(f"The body did not come within {BODY_S_MAX:.0f} s.", status=408) from None
        finally:
            self._bytes_held -= len(body)
        return bytes(body)

    def _check(self, body: bytearray) -> None:
        if len(body) > BODY_BYTES_MAX:
            raise too_large()
        if self._bytes_held > BODIES_BYTES_MAX:
            sentence = f"Bodies of more than {BODIES_BYTES_MAX} bytes are being sent to this node at once; try again."
            raise RequestError(sentence, status=503, retry_after_s=RETRY_AFTER_S)


def refuse_declared(request: Request) -> None:
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > BODY_BYTES_MAX:
        raise too_large()


def too_large() -> RequestError:
    return RequestError(f"The body is larger than the limit of {BODY_BYTES_MAX} bytes.", status=413)
