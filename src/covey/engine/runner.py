"""The runner process: goes from phase to phase as its node says (see `schema/runner`), then serves until it is ended.

Where a link is lost after it has loaded, it keeps its weights and waits for its node to begin a new generation.

The main thread is the only one that computes. SIGTERM and `ShutDown` end it wherever it is, by `SystemExit`.
"""

import logging
import signal
import sys
import threading
import time
from types import FrameType
from typing import Final, NoReturn

from covey.engine.contract import StageEngine
from covey.engine.cores import Cores
from covey.engine.draft import DraftModel
from covey.engine.engines import create
from covey.engine.generation import BegunAnewError, Generation
from covey.engine.handshake import LinkRefusedError
from covey.engine.link import LinkBrokenError, LinkClosedError
from covey.engine.mailbox import Mailbox
from covey.engine.parent import end_with_parent
from covey.engine.pipe import NodePipe
from covey.engine.port import DataPort, Reception
from covey.schema.runner import BEAT_MS, Configure, Parted, PhaseFailed, RunnerSpec

LOST: Final = "A part of the model was lost while it answered."  # for the clients

log = logging.getLogger(__name__)


class Runner:
    """What outlives a generation: the weights, the data port, and the line to the node."""

    def __init__(self, pipe: NodePipe) -> None:
        self._pipe = pipe
        self._cores = Cores()
        self._engine: StageEngine | None = None
        self._draft: DraftModel | None = None
        self._port: DataPort | None = None
        self._generation: Generation | None = None
        self._has_weights = False

    @property
    def phase(self) -> str:
        return self._generation.phase if self._generation else "configuring"

    def live(self) -> NoReturn:
        """Goes from generation to generation. Raises whatever ends it."""
        self._pipe.listen()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()
        configure = self._wait_configure()
        while True:
            configure = self._live_one(configure)

    def close(self, message: str) -> None:
        """Tells the clients `message` and the neighbours by closing."""
        if self._generation:
            self._generation.close(message)
        if self._port:
            self._port.close()

    def _live_one(self, configure: Configure) -> Configure:
        """One generation; returns what begins the next. Raises what ends the process."""
        generation = self._begin(configure)
        try:
            generation.live()
        except BegunAnewError as news:
            generation.close(LOST)
            return news.configure
        except (LinkBrokenError, LinkClosedError, LinkRefusedError) as error:
            if not (self._has_weights or generation.has_loaded):
                raise
            log.warning("it parted while %s: %s", generation.phase, error)
            generation.close(LOST)
            self._pipe.tell(Parted(str(error)))
            return self._wait_configure()
        finally:
            self._has_weights = self._has_weights or generation.has_loaded

    def _begin(self, configure: Configure) -> Generation:
        """What others still say to the former generation is lost with its mailbox."""
        mailbox: Mailbox = Mailbox()
        self._pipe.deliver_to(mailbox)
        reception = Reception(configure.spec, configure.credentials, mailbox)
        self._port = self._port or DataPort(reception)
        self._port.reception = reception
        self._generation = Generation(
            self._pipe, configure, mailbox, self._port, self._cores, self._find_engine, self._find_draft
        )
        return self._generation

    def _find_engine(self, spec: RunnerSpec) -> StageEngine:
        self._engine = self._engine or create(spec)
        return self._engine

    def _find_draft(self, spec: RunnerSpec) -> DraftModel | None:
        """The one that it has is gone before anything is loaded, if `spec` wants another one or none."""
        if self._draft and not self._draft.serves(spec):
            self._draft = None
        if spec.draft and self._draft is None:
            self._draft = DraftModel(spec, spec.draft, self._cores)
        return self._draft

    def _wait_configure(self) -> Configure:
        while True:
            message = self._pipe.take()
            if isinstance(message, Configure):
                return message

    def _beat(self) -> NoReturn:
        """Tells the node, which sees from outside neither whether a process was stopped nor how its work gets on."""
        while True:
            beat = self._generation.beat() if self._generation else None
            if beat:
                self._pipe.tell(beat)
            time.sleep(BEAT_MS / 1000)


def main() -> int:
    """Runs until it is ended; returns the exit status."""
    end_with_parent()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="runner: %(levelname)s %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the node decides what it means
    signal.signal(signal.SIGTERM, _end)
    pipe = NodePipe()
    runner = Runner(pipe)
    farewell = "The node is being stopped, or its part of the model is."  # whoever else may hold it now
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
        farewell = LOST
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
