"""The runner process: goes from phase to phase as its node says (see `schema/runner`), then serves until it is ended.

The main thread is the only one that computes. SIGTERM and `ShutDown` end it wherever it is, by `SystemExit`.
"""

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn, TypeVar

import psutil

from covey.engine.contract import LoadProgress, StageEngine
from covey.engine.engines import create
from covey.engine.handshake import Dialler
from covey.engine.link import Frame, Link, LinkBrokenError, LinkClosedError
from covey.engine.loop import Follower, Head, Loop, ProtocolError, Stage
from covey.engine.mailbox import LinkLost, Mailbox, Message, ServeCame, ServeGone, ServeSaid
from covey.engine.pipe import NodePipe
from covey.engine.port import DataPort
from covey.engine.tls import client_context
from covey.schema.runner import (
    BEAT_MS,
    Beat,
    Configure,
    Connected,
    ConnectTo,
    Listening,
    Load,
    Loaded,
    LoadProgressed,
    PhaseFailed,
    Ready,
    RunnerCommand,
    RunnerSpec,
    WarmUp,
)

log = logging.getLogger(__name__)
Command = TypeVar("Command", bound=RunnerCommand)


class Runner:
    def __init__(self, pipe: NodePipe) -> None:
        self._pipe = pipe
        self._mailbox: Mailbox = Mailbox()
        self._early: list[Message] = []  # came before this stage was ready for it
        self._port: DataPort | None = None
        self._links: list[Link] = []
        self._loop: Loop | None = None
        self.phase = "configuring"

    def live(self) -> NoReturn:
        """Goes through all phases and serves. Raises whatever ends it."""
        self._pipe.listen(self._mailbox)
        configure = self._wait_command(Configure)
        spec = configure.spec
        port = self._listen(configure)
        neighbours = self._wait_command(ConnectTo)
        self.phase = "connecting"
        link = self._connect(configure, port, neighbours)
        self._wait_command(Load)
        self.phase = "loading"
        engine = self._load(spec)
        self._wait_command(WarmUp)
        self.phase = "warming up"
        engine.warm_up()
        self.phase = "running"
        self._serve(spec, port, Stage(engine, link, is_last=spec.stage_index == spec.stage_count - 1))

    def close(self, message: str) -> None:
        """Tells the clients `message` and the neighbours by closing."""
        if self._loop:
            self._loop.close(message)
        for link in self._links:
            link.close()
        if self._port:
            self._port.close()

    def _wait_command(self, kind: type[Command]) -> Command:
        while True:
            message = self._mailbox.get()
            if isinstance(message, kind):
                return message
            if isinstance(message, RunnerCommand):
                raise ProtocolError(f"The node sent {type(message).__name__} where {kind.__name__} was due.")
            if isinstance(message, LinkLost):
                raise LinkBrokenError(message.reason)
            self._early.append(message)

    def _listen(self, configure: Configure) -> DataPort:
        port = self._port = DataPort(configure.spec, configure.credentials, self._mailbox)
        self._pipe.tell(Listening(port.number))
        return port

    def _connect(self, configure: Configure, port: DataPort, neighbours: ConnectTo) -> Link | None:
        """Reaches the next stage and waits for the one before. Alone there is nobody to link."""
        link, spec = None, configure.spec
        seconds = spec.connect_ms / 1000
        if spec.stage_count > 1:
            deadline = time.monotonic() + seconds
            dialler = Dialler(spec, client_context(configure.credentials))
            offering = (neighbours.stage_before, port.before, seconds)
            threading.Thread(target=dialler.offer, args=offering, name="offer", daemon=True).start()
            link = dialler.connect(neighbours.next_stage, port.after, seconds)
            self._listen_to(link, self._report_end)
            self._listen_to(self._wait_before(port, seconds, deadline), self._pass_on_frames)
        self._pipe.tell(Connected())
        return link

    @staticmethod
    def _wait_before(port: DataPort, seconds: float, deadline: float) -> Link:
        link = port.before.wait(deadline - time.monotonic())
        if link is None:
            raise LinkBrokenError(f"The stage before opened no link within {seconds:.0f} s.")
        return link

    def _load(self, spec: RunnerSpec) -> StageEngine:
        engine = create(spec)
        engine.load(self._tell_progress)
        self._pipe.tell(Loaded(psutil.Process().memory_info().rss))
        return engine

    def _tell_progress(self, progress: LoadProgress) -> None:
        self._pipe.tell(
            LoadProgressed(progress.layers_loaded, progress.layers_total, progress.bytes_loaded, progress.bytes_total)
        )

    def _serve(self, spec: RunnerSpec, port: DataPort, stage: Stage) -> NoReturn:
        loop = self._loop = Head(spec, stage, self._pipe.tell) if spec.stage_index == 0 else Follower(stage)
        port.open_for_requests()
        self._pipe.tell(Ready())
        threading.Thread(target=self._beat, args=(loop,), name="beat", daemon=True).start()
        for message in self._early:
            self._handle(loop, message)
        while True:
            self._handle(loop, self._mailbox.get())
            while loop.step():
                while not self._mailbox.empty():
                    self._handle(loop, self._mailbox.get())

    def _handle(self, loop: Loop, message: Message) -> None:
        match message:
            case Frame() | ServeCame() | ServeSaid() | ServeGone():
                loop.handle(message)
            case LinkLost():
                raise LinkBrokenError(message.reason)
            case _:
                raise ProtocolError(f"The node sent {type(message).__name__} to a runner that serves already.")

    # ---- other threads ----

    def _beat(self, loop: Loop) -> NoReturn:
        """Tells the node, which sees from outside neither whether a process was stopped nor how its work gets on."""
        while True:
            self._pipe.tell(Beat(loop.steps, loop.is_busy))
            time.sleep(BEAT_MS / 1000)

    def _listen_to(self, link: Link, listen: Callable[[Link], None]) -> None:
        self._links.append(link)
        threading.Thread(target=listen, args=(link,), name=f"link {len(self._links)}", daemon=True).start()

    def _pass_on_frames(self, link: Link) -> None:
        try:
            while True:
                self._mailbox.put(link.receive())
        except (LinkClosedError, LinkBrokenError) as error:
            self._mailbox.put(LinkLost(str(error)))

    def _report_end(self, link: Link) -> None:
        self._mailbox.put(LinkLost(str(link.wait_end())))


def main() -> int:
    """Runs until it is ended; returns the exit status."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="runner: %(levelname)s %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the node decides what it means
    signal.signal(signal.SIGTERM, _end)
    pipe = NodePipe()
    runner = Runner(pipe)
    farewell = "The model was stopped; start it again or choose another."
    try:
        runner.live()
    except Exception as error:  # the top of the process: whatever it was, the node is told
        if pipe.is_ending:
            return 0  # a neighbour was stopped first, or something broke on the way out: no failure
        if _is_ours(error):
            log.warning("it failed while %s: %s", runner.phase, error)
        else:
            log.exception("it failed while %s", runner.phase)
        pipe.tell(PhaseFailed(runner.phase, _sentence(error)))
        farewell = "A part of the model was lost while it answered."
        return 1
    finally:
        runner.close(farewell)


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough; the way out must not be interrupted
    raise SystemExit(0)


def _is_ours(error: Exception) -> bool:
    """Our errors are sentences that need no story."""
    return type(error).__module__.startswith("covey.")


def _sentence(error: Exception) -> str:
    """Of others' errors the type often says more than their text."""
    return str(error) if _is_ours(error) else f"{type(error).__name__}: {error}"
