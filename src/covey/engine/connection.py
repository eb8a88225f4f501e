"""One connection from `serving` to the head: commands come in, events go out, and a slow reader holds nobody up.

A connection that proves nothing for a while is dead. TCP notices a machine that is out of reach, but not a node that
was stopped, hangs or starves: its kernel goes on answering. It ends as if the other side had closed it, which cancels
its requests and frees their slots.
"""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from covey.engine.link import tune
from covey.engine.tls import Channel, explain
from covey.schema.generation import Alive, HeadMessage, ProveAlive, ServeCommand, ServeMessage
from covey.schema.wire import FrameBuffer, FrameTooLargeError, pack

BACKLOG_BYTES_MAX: Final = 4 * 1024 * 1024  # over 30000 events that nobody read: the other side hangs
RECEIVE_BYTES: Final = 64 * 1024
COMMANDS_WAITING_MAX: Final = 256  # more than a queue of requests and their cancellations; the rest waits in the socket
ALIVE_MS: Final = 1_000  # between two proofs
# As long as a node may be unheard before its work is given to others: one that swaps, or roams from one access point
# to the next, comes back before. Cut off too early, its requests would lose their places and be computed anew. What
# waiting costs is their slots, for these seconds, where it is really gone and closed no connection.
SILENCE_MS: Final = 10_000

log = logging.getLogger(__name__)
_messages = msgspec.msgpack.Decoder(ServeMessage)


class ServeConnection:
    """`owner` names it to the scheduler. Only the writer's thread ever waits for the other side to read."""

    def __init__(self, channel: Channel, owner: int, *, can_prove_alive: bool) -> None:
        channel.socket.settimeout(None)
        tune(channel.socket)
        self.owner = owner
        self._channel = channel
        self._connection = channel.socket
        self._backlog = bytearray()  # sealed already
        self._changed = threading.Condition()
        self._closed = False
        self._credits = threading.Semaphore(COMMANDS_WAITING_MAX)
        threading.Thread(target=self._write, name=f"writer {owner}", daemon=True).start()
        if can_prove_alive:
            channel.silence_ms_max = SILENCE_MS
            self.send([ProveAlive(ALIVE_MS)])

    def commands(self) -> Iterator[ServeCommand]:
        """What the other side asks for, until it closes the connection, sends nonsense, or nothing for too long.

        Commands that wait to be carried out do not count as silence: while they do nothing is read.
        """
        frames, data = FrameBuffer(), memoryview(bytearray(RECEIVE_BYTES))
        try:
            while count := self._channel.receive(data):
                for message in map(_messages.decode, frames.feed(bytes(data[:count]))):
                    if not isinstance(message, Alive):
                        self._credits.acquire()
                        if self._closed:
                            return
                        yield message
        except TimeoutError as silence:
            log.warning("a connection for requests is closed: %s", silence)
        except (OSError, ValueError, msgspec.MsgspecError, FrameTooLargeError) as error:
            log.warning("a connection for requests is closed: %s", explain(error))

    def handled(self) -> None:
        """One of `commands` was carried out; so many more may be read."""
        self._credits.release()

    def send(self, events: Iterable[HeadMessage]) -> None:
        """Sends at once what the socket takes, and leaves the rest to the writer. Never waits, never fails: whoever
        reads the commands learns that the connection has ended.
        """
        data = b"".join(map(pack, events))
        with self._changed:
            data = self._seal(data)
            if data and not self._backlog:
                data = data[self._send_now(data) :]
            if len(self._backlog) + len(data) > BACKLOG_BYTES_MAX:
                log.warning("a connection for requests is closed: it reads nothing")
                self._shut()
            elif data:
                self._backlog += data
                self._changed.notify()

    def close(self, seconds: float = 0.0) -> None:
        """Gives the backlog up to `seconds` to leave."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while self._backlog and not self._closed and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            self._shut()
        self._connection.close()

    def _seal(self, data: bytes) -> bytes:
        """What goes over the wire: nothing once the connection is closed."""
        if self._closed:
            return b""
        try:
            return self._channel.seal(data)
        except OSError:
            self._shut()
            return b""

    def _send_now(self, data: bytes) -> int:
        try:
            return self._connection.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            self._shut()
            return len(data)

    def _shut(self) -> None:
        """Ends both directions, which wakes the threads that wait on them."""
        with self._changed, contextlib.suppress(OSError):  # the other side may be gone already
            self._closed = True
            self._credits.release()  # to the thread that reads, so that it sees
            self._backlog.clear()
            self._changed.notify_all()
            self._connection.shutdown(socket.SHUT_RDWR)

    def _write(self) -> None:
        while data := self._wait_backlog():
            try:
                self._connection.sendall(data)
            except OSError:
                self._shut()
            with self._changed:
                del self._backlog[: len(data)]  # only now, so that nothing overtakes it
                self._changed.notify_all()

    def _wait_backlog(self) -> bytes:
        """What is to be sent next; nothing once the connection is closed."""
        with self._changed:
            while not (self._backlog or self._closed):
                self._changed.wait()
            return bytes(self._backlog)
