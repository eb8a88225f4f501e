"""Server-sent events: how objects, comments and failures look on the wire. Pure."""

from typing import Any, Final

import msgspec

from covey.api.errors import RequestError, render_error

KEEP_ALIVE: Final = b": keep-alive\n\n"
DONE: Final = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


def data(value: Any) -> bytes:
    """One event. `value` may be a Struct, whose tag is then its field `type`."""
    return b"data: " + _encode(value) + b"\n\n"


def queued(position: int, waiting_requests: int) -> bytes:
    """The same for each dialect: a comment, since none has a word for it."""
    return f": queued {position} of {waiting_requests}\n\n".encode()


def comment(name: str, value: Any) -> bytes:
    """Something that clients may read and parsers skip."""
    return b": " + name.encode() + b" " + _encode(value) + b"\n\n"


def failure(error: RequestError) -> bytes:
    """An error after the stream has begun, when its status can't be told any more, in the envelope of all errors."""
    return data(render_error(error.message, error.status, error.param, error.code))
