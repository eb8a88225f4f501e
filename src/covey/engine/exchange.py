"""What the ranks of a stage tell one another in the middle of a step, over a connection of its own to each other rank.

A message is an opening that says what it is, and raw little-endian float32. Each goes to all at once: a stage has few
ranks, and for the few KB of a token one trip counts more than the bytes. Nobody waits by the clock, for a rank that
computes slowly is not lost. One whose machine is gone is, after the seconds that `link.tune` gives a connection; and
whoever learns in another way that a rank is lost calls `close`.
"""

import contextlib
import queue
import socket
import struct
import threading
from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from covey.engine.link import VALUES_BYTES_MAX, LinkBrokenError, tune
from covey.engine.tls import Channel, explain

Floats = NDArray[np.float32]

OPENING: Final = struct.Struct("<IIII")  # the message's number, `SUM` or `JOIN`, rows, columns
SUM: Final = 1
JOIN: Final = 2
NUMBERS: Final = 1 << 32  # messages are counted up to here, and then from 0 again
DIRECT_BYTES_MAX: Final = 32 * 1024  # two of these lie in a connection's buffers, whether or not the other side reads
FLOAT_BYTES: Final = 4


class ChannelExchange:
    """Implements `Exchange`. One thread uses it; another one may close it."""

    def __init__(self, rank: int, channels: Mapping[int, Channel]) -> None:
        """`channels`: to each other rank; their handshakes are over."""
        assert sorted([rank, *channels]) == list(range(len(channels) + 1)), "there is a channel to each other rank"
        self.rank = rank
        self.count = len(channels) + 1
        self.is_waiting = False  # for another rank's part; other threads look
        self._number = 0
        self._peers = [_Peer(other, channels[other]) for other in sorted(channels)]

    def add_up(self, values: Floats) -> None:
        """Raises `LinkBrokenError`."""
        opening = self._opening(SUM, values)
        try:
            for peer in self._peers:
                peer.begin_to_send(opening, values)
            parts = self._receive(SUM, len(values), values.shape[1])
            for peer in self._peers:
                peer.end_sending()
        except LinkBrokenError:
            self.close()  # the others wait for us
            raise
        parts.insert(self.rank, values)
        total = parts[0]
        for part in parts[1:]:
            total += part
        if total is not values:
            values[:] = total

    def join(self, values: Floats) -> Floats | None:
        """Raises `LinkBrokenError`."""
        opening = self._opening(JOIN, values)
        try:
            if self.rank == 0:
                parts = self._receive(JOIN, len(values))
                return np.concatenate([values, *parts], axis=1)
            self._peers[0].begin_to_send(opening, values)
            self._peers[0].end_sending()
        except LinkBrokenError:
            self.close()
            raise
        return None

    def close(self) -> None:
        """Whoever waits in `add_up` or `join`, or calls them later, gets a `LinkBrokenError`."""
        for peer in self._peers:
            peer.close()

    def _receive(self, kind: int, rows: int, columns: int | None = None) -> list[Floats]:
        self.is_waiting = True
        parts = [peer.receive(self._number, kind, rows, columns) for peer in self._peers]
        self.is_waiting = False
        return parts

    def _opening(self, kind: int, values: Floats) -> bytes:
        assert values.dtype == np.float32, "parts of a step are float32"
        self._number = (self._number + 1) % NUMBERS
        return OPENING.pack(self._number, kind, *values.shape)


class _Peer:
    """The connection to one other rank."""

    def __init__(self, rank: int, channel: Channel) -> None:
        channel.socket.settimeout(None)
        tune(channel.socket)
        self._rank = rank
        self._channel = channel
        self._closed = False
        self._received = bytearray(OPENING.size)
        self._sender: _Sender | None = None
        self._is_sender_busy = False

    def begin_to_send(self, opening: bytes, values: Floats) -> None:
        """`values` must stay as they are until `end_sending`. Raises `LinkBrokenError`, as all here do."""
        try:
            if values.nbytes <= DIRECT_BYTES_MAX:
                self._channel.send(opening + values.tobytes())
                return
            if self._sender is None:
                self._sender = _Sender(self._channel, f"exchange with rank {self._rank}")
            self._sender.begin(opening, np.ascontiguousarray(values))
            self._is_sender_busy = True
        except OSError as error:
            raise self._lost(explain(error)) from error

    def end_sending(self) -> None:
        if self._sender is None or not self._is_sender_busy:
            return
        self._is_sender_busy = False
        error = self._sender.wait()
        if error is not None:
            raise self._lost(explain(error)) from error

    def receive(self, number: int, kind: int, rows: int, columns: int | None = None) -> Floats:
        """Their values; good until the next call. `columns`: how many there must be, where that is known."""
        try:
            self._fill(0, OPENING.size)
            said = OPENING.unpack_from(self._received)
            due = (number, kind, rows, said[-1] if columns is None else columns)
            length = said[2] * said[3] * FLOAT_BYTES
            if said != due or length > VALUES_BYTES_MAX:
                raise self._lost(f"it sent {_told(*said)} where {_told(*due)} was due, so it computes another step")
            self._fill(OPENING.size, OPENING.size + length)
        except OSError as error:
            raise self._lost(explain(error)) from error
        return np.frombuffer(self._received, "<f4", length // FLOAT_BYTES, OPENING.size).reshape(said[2:])

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):  # it may be gone already
            self._channel.socket.shutdown(socket.SHUT_RDWR)  # wakes the threads that read and write
        self._channel.socket.close()
        if self._sender is not None:
            self._sender.stop()

    def _fill(self, start: int, end: int) -> None:
        if len(self._received) < end:
            self._received = self._received + bytearray(end - len(self._received))
        if self._channel.fill(memoryview(self._received)[start:end]) < end - start:
            raise self._lost("it closed the connection in the middle of a step")

    def _lost(self, reason: str) -> LinkBrokenError:
        if self._closed:
            return LinkBrokenError(f"The connection to rank {self._rank} of this stage was closed here.")
        return LinkBrokenError(f"The connection to rank {self._rank} of this stage is lost: {reason}.")


def _told(number: int, kind: int, rows: int, columns: int) -> str:
    return f"message {number} of kind {kind} with {rows} x {columns} numbers"


class _Sender:
    """A thread that sends what is large, so that both sides can send at once and still read."""

    def __init__(self, channel: Channel, name: str) -> None:
        self._channel = channel
        self._orders: queue.SimpleQueue[tuple[bytes, Floats] | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[OSError | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def begin(self, opening: bytes, values: Floats) -> None:
        self._orders.put((opening, values))

    def wait(self) -> OSError | None:
        """Until what was begun is sent, or can't be."""
        return self._outcomes.get()

    def stop(self) -> None:
        self._orders.put(None)

    def _work(self) -> None:
        while (order := self._orders.get()) is not None:
            opening, values = order
            try:
                self._channel.send(opening)
                self._channel.send(values.data.cast("B"))
            except OSError as error:
                self._outcomes.put(error)
            else:
                self._outcomes.put(None)
