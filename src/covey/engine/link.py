"""The connection that carries steps from one stage to the next: framed, with blocking sockets.

It begins with TLS (`tls`), then as `handshake` says. After that a frame is a `wire` frame that holds an `Opening`, and
the raw little-endian numbers that it announces. Threads that block in `recv` turn a step around on loopback faster
than an event loop.
"""

import contextlib
import math
import socket
from typing import Final

import msgspec
import numpy as np
from msgspec import Struct

from covey.engine.plan import StepOutcome, StepPlan, Values
from covey.engine.tls import Channel, explain
from covey.schema.wire import LENGTH_BYTES, FrameTooLargeError, body_length, pack

VALUES_BYTES_MAX: Final = 256 * 1024 * 1024  # a chunk of 128 tokens of 16384 float32 is 8 MiB
JOINED_BYTES_MAX: Final = 64 * 1024  # up to here one copy is cheaper than a second packet
SILENCE_SECONDS: Final = 10  # a machine that lost its power says no goodbye
PULSE: Final = b"\0"  # against the direction of the steps: whoever receives is alive
PULSE_SECONDS: Final = 1.0
PULSE_SILENCE_SECONDS: Final = 5  # a device that roams from one access point to another is back by then

# NumPy has no bfloat16: such numbers travel as the uint16 that hold them.
DTYPES: Final = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
}
DTYPE_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


class LinkClosedError(Exception):
    """The link was closed by this side."""


class LinkBrokenError(Exception):
    """The other side closed the link, went away, or said what it must not; the message is a sentence."""


class Opening(Struct, frozen=True, array_like=True):
    """What opens a frame. `dtype` is a key of `DTYPES`; without values it is empty."""

    message: StepPlan | StepOutcome
    dtype: str = ""
    shape: tuple[int, ...] = ()


class Frame(Struct, frozen=True):
    """What arrives by a link."""

    message: StepPlan | StepOutcome
    values: Values | None


_openings = msgspec.msgpack.Decoder(Opening)


class Link:
    """One direction between two stages: one thread sends, or one thread receives."""

    def __init__(self, channel: Channel, peer: str) -> None:
        channel.socket.settimeout(None)
        tune(channel.socket)
        self.channel = channel  # for those that say by themselves what goes over it
        self._peer = peer
        self._closed = False
        self._given_up: LinkBrokenError | None = None

    def send(self, message: StepPlan | StepOutcome, values: Values | None = None) -> None:
        """Raises `LinkClosedError`, `LinkBrokenError`."""
        try:
            if values is None:
                self.channel.send(pack(Opening(message)))
            else:
                self._send_values(message, little_endian(values))
        except OSError as error:
            raise self._lost(explain(error)) from error

    def _send_values(self, message: StepPlan | StepOutcome, values: Values) -> None:
        opening = pack(Opening(message, DTYPE_NAMES[values.dtype], values.shape))
        if values.nbytes <= JOINED_BYTES_MAX:
            self.channel.send(opening + values.tobytes())
        else:
            self.channel.send(opening)
            self.channel.send(values.data.cast("B"))

    def receive(self) -> Frame:
        """Waits for the next frame. Raises `LinkClosedError`, `LinkBrokenError`."""
        try:
            opening = _openings.decode(self._read(body_length(self._read(LENGTH_BYTES))))
            return Frame(opening.message, self._receive_values(opening) if opening.dtype else None)
        except (OSError, ValueError, msgspec.MsgspecError, FrameTooLargeError) as error:
            raise self._lost(explain(error)) from error

    def pulse(self) -> None:
        """For a link that only receives: says that this side is alive. Raises `LinkClosedError`, `LinkBrokenError`."""
        try:
            self.channel.send(PULSE)
        except OSError as error:
            raise self._lost(explain(error)) from error

    def wait_end(self) -> Exception:
        """For a link that only sends: returns why it ended, as soon as it has, or the other side's pulse stopped."""
        self.channel.silence_ms_max = PULSE_SILENCE_SECONDS * 1000
        try:
            while self._read(1) == PULSE:
                pass
        except (LinkClosedError, LinkBrokenError) as error:
            return error
        except TimeoutError:
            return self._give_up(f"it gave no sign of life for {PULSE_SILENCE_SECONDS} s")
        except (OSError, ValueError) as error:
            return self._lost(explain(error))
        return self._lost("it sent what nobody asked for")

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):  # it may be gone already
            self.channel.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads
        self.channel.socket.close()

    def _receive_values(self, opening: Opening) -> Values:
        if opening.dtype not in DTYPES or min(opening.shape, default=0) < 0:
            raise ValueError(f"numbers of type {opening.dtype} and shape {opening.shape} were announced")
        dtype = DTYPES[opening.dtype]
        length = math.prod(opening.shape) * dtype.itemsize
        if length > VALUES_BYTES_MAX:
            raise ValueError(f"{length} bytes of numbers were announced; the limit is {VALUES_BYTES_MAX}")
        values = np.empty(opening.shape, dtype)
        if length and self.channel.fill(values.data.cast("B")) != length:
            raise self._lost("it closed the link in the middle of a step")
        return values

    def _read(self, length: int) -> bytes:
        data = bytearray(length)
        if self.channel.fill(memoryview(data)) < length:
            raise self._lost("it closed the link")
        return bytes(data)

    def _give_up(self, reason: str) -> LinkBrokenError:
        """Wakes the thread that sends, which may wait for the other side to read."""
        self._given_up = LinkBrokenError(f"The link to {self._peer} is lost: {reason}.")
        with contextlib.suppress(OSError):  # it may be gone already
            self.channel.socket.shutdown(socket.SHUT_RDWR)
        return self._given_up

    def _lost(self, reason: str) -> LinkClosedError | LinkBrokenError:
        if self._given_up:
            return self._given_up
        if self._closed:
            return LinkClosedError(f"The link to {self._peer} was closed here.")
        return LinkBrokenError(f"The link to {self._peer} is lost: {reason}.")


def tune(connection: socket.socket) -> None:
    """Sends small frames at once, and notices within seconds that the other machine is gone."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", SILENCE_SECONDS // 2),  # Linux
        ("TCP_KEEPALIVE", SILENCE_SECONDS // 2),  # macOS
        ("TCP_KEEPINTVL", 1),
        ("TCP_KEEPCNT", SILENCE_SECONDS // 2),
        ("TCP_USER_TIMEOUT", SILENCE_SECONDS * 1000),  # Linux: for what was sent and is not acknowledged
    ):
        if option := getattr(socket, name, None):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def little_endian(values: Values) -> Values:
    """`values` as they go over a link: contiguous, of one of `DTYPES`. Raises `TypeError` for another type."""
    dtype = values.dtype.newbyteorder("<")
    if dtype not in DTYPE_NAMES:
        raise TypeError(f"activations of type {values.dtype} can't go over a link")
    return np.ascontiguousarray(values, dtype)
