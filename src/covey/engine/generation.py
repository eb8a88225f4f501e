"""One generation of a runner: links to its neighbours, loads what it lacks, and serves until something ends it.

The main thread waits on the mailbox alone, but while it computes. So the node's next word always finds it, whoever
does not answer on a link.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

import psutil

from covey.engine.contract import ALONE, LoadProgress, StageEngine
from covey.engine.cores import Cores
from covey.engine.draft import DraftModel
from covey.engine.exchange import ChannelExchange
from covey.engine.link import PULSE_SECONDS, Frame, Link, LinkBrokenError, LinkClosedError
from covey.engine.linking import Linking
from covey.engine.loop import Follower, Head, Loop, ProtocolError, Stage
from covey.engine.mailbox import Linked, LinkLost, Mailbox, Message, ServeCame, ServeGone, ServeSaid, Unlinked
from covey.engine.pipe import NodePipe
from covey.engine.port import DataPort
from covey.engine.sampler import Sampler
from covey.engine.tls import client_context
from covey.schema.runner import (
    Beat,
    Configure,
    Connected,
    ConnectTo,
    Listening,
    Load,
    Loaded,
    LoadProgressed,
    Ready,
    RunnerCommand,
    RunnerSpec,
    WarmUp,
)

log = logging.getLogger(__name__)
Awaited = TypeVar("Awaited", bound=RunnerCommand | Linked)


class BegunAnewError(Exception):
    """The node wants another generation."""

    def __init__(self, configure: Configure) -> None:
        super().__init__("the node begins a new generation")
        self.configure = configure


class Generation:
    """`port` receives for this generation, which its `mailbox` is for alone."""

    def __init__(
        self,
        pipe: NodePipe,
        configure: Configure,
        mailbox: Mailbox,
        port: DataPort,
        cores: Cores,
        find_engine: Callable[[RunnerSpec], StageEngine],
        find_draft: Callable[[RunnerSpec], DraftModel | None],
    ) -> None:
        self.spec = configure.spec
        self.loop: Loop | None = None
        self.phase = "configuring"
        self.has_loaded = False
        self._pipe = pipe
        self._credentials = configure.credentials
        self._mailbox = mailbox
        self._cores = cores
        self._port_number, self._reception = port.number, port.reception
        self._find_engine, self._find_draft = find_engine, find_draft
        self._exchange: ChannelExchange | None = None  # with the other ranks
        self._loss = ""  # why the first link that was lost was
        self._early: list[Message] = []  # came before this stage was ready for it

    def live(self) -> NoReturn:
        """Goes through all phases and serves. Raises whatever ends it."""
        self._start("pulse", self._pulse)
        self._pipe.tell(Listening(self._port_number))
        neighbours = self._wait(ConnectTo)
        self.phase = "connecting"
        linked = self._connect(neighbours)
        self._wait(Load)
        self.phase = "loading"
        draft = self._find_draft(self.spec)
        if draft:
            draft.compare(self.spec)
        engine = self._find_engine(self.spec)
        engine.load(self.spec, self._tell_progress, self._exchange or ALONE)
        self.has_loaded = True
        if draft:
            draft.load(self.spec, self._tell_drafts_progress)
        self._pipe.tell(Loaded(psutil.Process().memory_info().rss))
        self._wait(WarmUp)
        try:
            self._compute(engine, draft, linked)
        except LinkBrokenError as error:  # in the middle of a step it says less than what the link was lost by
            raise LinkBrokenError(self._loss or str(error)) from error

    def beat(self) -> Beat | None:
        """How its steps get on; None while there are none. For another thread."""
        loop = self.loop
        if loop is None:
            return None
        waits = loop.waits_for_others or (self._exchange is not None and self._exchange.is_waiting)
        return Beat(loop.steps, loop.is_busy, waits)

    def close(self, message: str) -> None:
        """Tells the clients `message` and the neighbours by closing."""
        loop, self.loop = self.loop, None
        if loop:
            loop.close(message)
        if self._exchange:
            self._exchange.close()
        self._reception.close()
        self._cores.leave()

    # ---- before it serves ----

    def _wait(self, kind: type[Awaited]) -> Awaited:
        while True:
            message = self._mailbox.get()
            if isinstance(message, kind):
                return message
            if isinstance(message, Unlinked):
                raise message.error
            if isinstance(message, Frame | ServeCame | ServeSaid | ServeGone):
                self._early.append(message)
            else:
                self._refuse(message, kind.__name__)

    def _connect(self, neighbours: ConnectTo) -> Linked:
        """Reaches the next stage and the ranks above, and waits for the others. Alone there is nobody to link."""
        linked = Linked()
        if self.spec.stage_count > 1 or self.spec.rank_count > 1:
            self._start("linking", self._link, neighbours)
            linked = self._wait(Linked)
        if linked.sums:
            channels = {rank: link.channel for rank, link in linked.sums.items()}
            self._exchange = ChannelExchange(self.spec.rank, channels)
        for link in (linked.after, *linked.steps):
            if link:
                self._start("link after", self._report_end, link)
        if linked.before:
            self._start("link before", self._pass_on_frames, linked.before)
        self._pipe.tell(Connected())
        return linked

    def _link(self, neighbours: ConnectTo) -> None:
        """In a thread of its own."""
        linking = Linking(self.spec, neighbours, self._reception, client_context(self._credentials))
        try:
            self._mailbox.put(linking.link())
        except Exception as error:  # noqa: BLE001 - whatever it was, the main thread is to fail by it
            self._mailbox.put(Unlinked(error))

    def _tell_progress(self, progress: LoadProgress) -> None:
        self._pipe.tell(
            LoadProgressed(progress.layers_loaded, progress.layers_total, progress.bytes_loaded, progress.bytes_total)
        )

    def _tell_drafts_progress(self, progress: LoadProgress) -> None:
        """The layers that are told of are the shard's, all of which are there; so the bytes tell how it gets on."""
        layers = self.spec.shard.layer_end - self.spec.shard.layer_start
        self._pipe.tell(LoadProgressed(layers, layers, progress.bytes_loaded, progress.bytes_total))

    # ---- while it computes ----

    def _compute(self, engine: StageEngine, draft: DraftModel | None, linked: Linked) -> NoReturn:
        self.phase = "warming up"
        engine.warm_up()
        if draft:
            draft.warm_up()
        self.phase = "running"
        samples = self.spec.stage_index == self.spec.stage_count - 1 and self.spec.rank == 0
        sampler = Sampler(self.spec.model_path, self.spec.thread_count) if samples else None
        self._serve(Stage(engine, self._cores, linked.after, sampler, linked.steps), draft)

    def _serve(self, stage: Stage, draft: DraftModel | None) -> NoReturn:
        is_head = self.spec.stage_index == self.spec.rank == 0
        loop = self.loop = Head(self.spec, stage, self._pipe.tell, draft) if is_head else Follower(stage)
        self._reception.open_for_requests()
        self._pipe.tell(Ready())
        for message in self._early:
            self._handle(loop, message)
        while True:
            self._handle(loop, self._mailbox.get())
            while loop.step():
                while not self._mailbox.empty():
                    self._handle(loop, self._mailbox.get())

    def _handle(self, loop: Loop, message: Message) -> None:
        if isinstance(message, Frame | ServeCame | ServeSaid | ServeGone):
            loop.handle(message)
        else:
            self._refuse(message, "nothing")

    def _refuse(self, message: Message, due: str) -> NoReturn:
        match message:
            case Configure():
                raise BegunAnewError(message)
            case LinkLost():
                raise LinkBrokenError(message.reason)
            case _:
                raise ProtocolError(f"The node sent {type(message).__name__} where {due} was due.")

    # ---- other threads ----

    @staticmethod
    def _start(name: str, run: Callable[..., None], *arguments: object) -> None:
        threading.Thread(target=run, args=arguments, name=name, daemon=True).start()

    def _pulse(self) -> None:
        """From the moment that there is a link: the stage before may have both of its own by then, while this one has
        not even been told of its neighbours.
        """
        link = self._reception.before.wait(None)
        while link:
            try:
                link.pulse()
            except (LinkClosedError, LinkBrokenError):
                return  # the thread that reads tells why
            time.sleep(PULSE_SECONDS)

    def _pass_on_frames(self, link: Link) -> None:
        try:
            while True:
                self._mailbox.put(link.receive())
        except (LinkClosedError, LinkBrokenError) as error:
            self._lose(str(error))

    def _report_end(self, link: Link) -> None:
        self._lose(str(link.wait_end()))

    def _lose(self, reason: str) -> None:
        """Also wakes the main thread where it waits for a rank that will say nothing more."""
        self._loss = self._loss or reason
        self._mailbox.put(LinkLost(reason))
        if self._exchange:
            self._exchange.close()
