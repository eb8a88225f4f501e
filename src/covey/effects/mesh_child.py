"""One mesh process as its node holds it: started by command line, spoken to in frames, pinged, and always reaped."""

import asyncio
import logging
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import anyio
import msgspec

from covey.effects.clock import Clock
from covey.schema import wire
from covey.schema.mesh import FromMesh, Linked, MeshSetup, Opened, OpenFailed, Ping, Pong, Put, ToMesh, Urgency

# -P: the folder we stand in hides no module.
MESH_COMMAND: Final = (sys.executable, "-P", "-m", "covey.effects.mesh_process")
READ_BYTES: Final = 64 * 1024
PING_S: Final = 3.0
PINGS_UNANSWERED_MAX: Final = 3
OPEN_S_MAX: Final = 15.0  # small boards import slowly
SLEPT_MS: Final = 10_000  # a longer gap between two pings: the other side of every connection has given it up
LINK_WAIT_S: Final = 2.0  # what may wait waits so long for the first peer
SETTLE_S: Final = 0.2  # after the first connection: Zenoh drops what nobody subscribed to, as far as it has heard
WAITING_MAX: Final = 1024
UNWRITTEN_BYTES_MAX: Final = 32 * 1024 * 1024
END_S_MAX: Final = 1.5

_log = logging.getLogger(__name__)


class Waiting:
    """Messages for the next process, or for the first peer of this one."""

    def __init__(self) -> None:
        self.puts: deque[Put] = deque()

    def add(self, put: Put) -> bool:
        """False when there was no room. Of what ages only the last is kept, of heartbeats none."""
        if put.urgency is Urgency.BEAT:
            return True
        if put.urgency is Urgency.FRESH:
            self.puts = deque(each for each in self.puts if (each.key, each.urgency) != (put.key, Urgency.FRESH))
        if len(self.puts) >= WAITING_MAX:
            return False
        self.puts.append(put)
        return True


class MeshChild:
    """`hear` is told all but pongs. `run` ends when the process is to be replaced, and `ending` says why."""

    def __init__(self, waiting: Waiting, hear: Callable[[FromMesh], None], clock: Clock) -> None:
        self._waiting = waiting
        self._hear = hear
        self._clock = clock
        self._process: Process | None = None
        self._decoder = msgspec.msgpack.Decoder(FromMesh)
        self._is_open = False
        self._is_flowing = False  # nothing waits any more
        self._unanswered = 0
        self._over = anyio.Event()
        self.linked = 0
        self.ending = ""
        self.is_failure = False

    def put(self, put: Put) -> bool:
        """False when it is dropped for want of room."""
        if self._is_open and (self._is_flowing or put.urgency is Urgency.BEAT):
            return self._write(put)
        return self._waiting.add(put)

    def end(self, reason: str) -> None:
        """Asks for the end, so that another process can start; the first reason counts."""
        self.ending = self.ending or reason
        self._over.set()

    def _fail(self, reason: str) -> None:
        self.is_failure = self.is_failure or not self.ending
        self.end(reason)

    async def run(self, setup: MeshSetup) -> None:
        """Until `end`, or until the process ends, hangs or can't open. Cancelling it ends the process too."""
        try:
            self._process = await asyncio.create_subprocess_exec(
                *MESH_COMMAND, stdin=PIPE, stdout=PIPE, start_new_session=True
            )
        except OSError as error:
            self._fail(f"it could not be started: {error.strerror or error}")
            return
        try:
            async with anyio.create_task_group() as tasks:
                self._write(setup)
                tasks.start_soon(self._read, self._process)
                tasks.start_soon(self._watch)
                await self._over.wait()
                tasks.cancel_scope.cancel()
        finally:
            self._is_open = False
            with anyio.CancelScope(shield=True):
                await _end(self._process)

    def _write(self, message: ToMesh) -> bool:
        if self._process is None or self._process.stdin is None or self._process.stdin.is_closing():
            return True  # it is ending, and what may wait has been put aside before
        if self._process.stdin.transport.get_write_buffer_size() > UNWRITTEN_BYTES_MAX:
            return False
        self._process.stdin.write(wire.pack(message))
        return True

    async def _read(self, process: Process) -> None:
        frames = wire.FrameBuffer()
        if process.stdout is None:
            raise AssertionError("a mesh process is always started with pipes")
        try:
            while data := await process.stdout.read(READ_BYTES):
                for body in frames.feed(data):
                    self._take(self._decoder.decode(body))
        except (msgspec.DecodeError, wire.FrameTooLargeError) as error:
            self._fail(f"it said what can't be read: {error}")
        self._fail("it ended")

    def _take(self, message: FromMesh) -> None:
        match message:
            case Pong():
                self._unanswered = 0
                return
            case Opened():
                self._is_open = True
                self._flow_in(SETTLE_S if self.linked else LINK_WAIT_S)
            case OpenFailed(reason):
                self._fail(reason)
            case Linked(count):
                self.linked = count
                if count:
                    self._flow_in(SETTLE_S)
            case _:
                pass
        self._hear(message)

    def _flow_in(self, wait_s: float) -> None:
        asyncio.get_running_loop().call_later(wait_s, self._flow)

    def _flow(self) -> None:
        """From here on nothing waits."""
        if self._is_open and not self._is_flowing:
            self._is_flowing = True
            while self._waiting.puts:
                self._write(self._waiting.puts.popleft())

    async def _watch(self) -> None:
        """Ends it when it does not open or answer, or when this machine slept."""
        opened_by = anyio.current_time() + OPEN_S_MAX
        while True:
            before_ms = self._clock()
            await anyio.sleep(PING_S)
            if self._clock() - before_ms > SLEPT_MS:
                self.end("this machine slept")
            if not self._is_open and anyio.current_time() > opened_by:
                self._fail(f"it did not open within {OPEN_S_MAX:.0f} s")
            if self._unanswered >= PINGS_UNANSWERED_MAX:
                self._fail("it does not answer")
            self._unanswered += self._is_open
            self._write(Ping())


async def _end(process: Process) -> None:
    """Asks by the end of its input, then kills."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        with anyio.fail_after(END_S_MAX):
            await _drained(process)
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await _drained(process)


async def _drained(process: Process) -> None:
    """What it still says is read, else it might never come to its end."""
    while process.stdout is not None and await process.stdout.read(READ_BYTES):
        pass
    await process.wait()
