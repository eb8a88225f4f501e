"""How a link is opened: one `wire` frame each way, `LinkHello`, answered by `LinkWelcome` or `LinkRefused`.

So neither a stranger nor a stage of another instance, or in the wrong place, ends up in the middle of a pipeline.
"""

import socket
import time
from typing import Final

import msgspec
from msgspec import Struct

from covey.engine.link import Link, LinkBrokenError
from covey.schema.runner import Address, RunnerSpec
from covey.schema.wire import LENGTH_BYTES, FrameTooLargeError, body_length, pack

HELLO_BYTES_MAX: Final = 4096  # a stranger's first frame makes nobody reserve memory
HELLO_SECONDS: Final = 5.0  # who connects has its hello ready
RETRY_SECONDS: Final = 0.05


class LinkRefusedError(Exception):
    """The other side does not want this link, and says why."""


class LinkHello(Struct, frozen=True, tag=True):
    """Who opens a link: its own stage, and whose it is."""

    instance_id: str
    stage_index: int
    stage_count: int


class LinkWelcome(Struct, frozen=True, tag=True):
    pass


class LinkRefused(Struct, frozen=True, tag=True):
    reason: str


_answers = msgspec.msgpack.Decoder(LinkWelcome | LinkRefused)


def hello_of(spec: RunnerSpec) -> LinkHello:
    return LinkHello(spec.instance_id, spec.stage_index, spec.stage_count)


def link_refusal(spec: RunnerSpec, hello: LinkHello) -> str | None:
    """Why the stage of `spec` does not take a link from whoever says `hello`."""
    if hello.instance_id != spec.instance_id:
        return f"this stage belongs to instance {spec.instance_id}, not {hello.instance_id}."
    before = (spec.stage_index - 1) % spec.stage_count
    if (hello.stage_index, hello.stage_count) != (before, spec.stage_count):
        return (
            f"stage {spec.stage_index} of {spec.stage_count} follows stage {before},"
            f" not stage {hello.stage_index} of {hello.stage_count}."
        )
    return None


def connect(address: Address, hello: LinkHello, seconds: float) -> Link:
    """Opens a link, trying again for up to `seconds` while nobody listens there yet.

    Raises `LinkRefusedError`, and `LinkBrokenError` if the stage can't be reached.
    """
    peer = f"stage {(hello.stage_index + 1) % hello.stage_count} at {address.host}:{address.port}"
    deadline = time.monotonic() + seconds
    while True:
        try:
            return _introduce(address, hello, peer, max(deadline - time.monotonic(), RETRY_SECONDS))
        except OSError as error:
            if time.monotonic() + RETRY_SECONDS > deadline:
                reason = error.strerror or str(error)
                raise LinkBrokenError(f"No link to {peer} within {seconds:.0f} s: {reason}.") from error
        time.sleep(RETRY_SECONDS)


def _introduce(address: Address, hello: LinkHello, peer: str, seconds: float) -> Link:
    """One try. Raises `OSError` where another may help."""
    seconds = min(seconds, HELLO_SECONDS)
    connection = socket.create_connection((address.host, address.port), seconds)
    try:
        connection.sendall(pack(hello))
        answer = _answers.decode(receive_first(connection, seconds))
    except (OSError, msgspec.MsgspecError, FrameTooLargeError) as error:
        connection.close()
        raise OSError(f"it did not answer as a stage does ({error})") from error
    if isinstance(answer, LinkRefused):
        connection.close()
        raise LinkRefusedError(f"The link to {peer} was refused: {answer.reason}")
    return Link(connection, peer)


def receive_first(connection: socket.socket, seconds: float = HELLO_SECONDS) -> bytes:
    """The body of the frame that opens a connection, and not a byte beyond it. Raises `OSError`,
    `FrameTooLargeError`.
    """
    connection.settimeout(seconds)
    deadline = time.monotonic() + seconds
    length = body_length(_receive_exactly(connection, LENGTH_BYTES, deadline))
    if length > HELLO_BYTES_MAX:
        raise FrameTooLargeError(f"a first frame of {length} bytes was announced; the limit is {HELLO_BYTES_MAX}")
    return _receive_exactly(connection, length, deadline)


def _receive_exactly(connection: socket.socket, length: int, deadline: float) -> bytes:
    data = b""
    while len(data) < length:
        if time.monotonic() > deadline:
            raise TimeoutError("its hello took too long")
        more = connection.recv(length - len(data))
        if not more:
            raise ConnectionResetError("it closed the connection")
        data += more
    return data
