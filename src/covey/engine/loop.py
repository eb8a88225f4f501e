"""What a runner does while it serves: the head plans steps and learns what became of them; each stage runs them."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from covey.engine.connection import ServeConnection
from covey.engine.contract import StageEngine
from covey.engine.cores import Cores
from covey.engine.draft import DraftModel
from covey.engine.link import Frame, Link
from covey.engine.mailbox import ServeCame, ServeGone, ServeMessage, ServeSaid
from covey.engine.plan import StepOutcome, StepPlan, Values
from covey.engine.sampler import Sampler
from covey.engine.scheduler import Events, Scheduler
from covey.schema.generation import Admit, HeadEvent
from covey.schema.runner import Activity, RunnerSpec

LOOKUP_OFF: Final = ("lookup", "0")  # the engine option that lets nothing be looked up, to measure by
ACTIVITY_SECONDS: Final = 0.5  # between two reports while busy
FAREWELL_SECONDS: Final = 1.0  # for the last events of a runner that ends


class ProtocolError(Exception):
    """Another stage sent what its place in the pipeline does not allow."""


class Stage:
    """One engine, those that compute together with it, and the way on from it."""

    def __init__(
        self,
        engine: StageEngine,
        cores: Cores,
        link: Link | None,
        sampler: Sampler | None,
        ranks: Sequence[Link] = (),
    ) -> None:
        self._engine = engine
        self._cores = cores
        self._link = link  # to the next stage; None where one stage is alone, and at ranks above 0
        self._sampler = sampler  # of the last stage, at rank 0
        self._ranks = ranks  # at rank 0: to the others of this stage
        self.is_running = False

    def run(self, plan: StepPlan, values: Values) -> StepOutcome | None:
        """Runs one step and sends on what came out; alone, returns the outcome. Ranks above 0 keep nothing of it.

        Raises `EngineError`, `LinkBrokenError`, `LinkClosedError`.
        """
        for rank in self._ranks:
            rank.send(StepPlan(plan.step, plan.pieces), values)
        self.is_running = True
        with self._cores.computing():
            result = self._engine.run(plan.pieces, values)
            outcome = self._sampler.sample(plan, result) if self._sampler else None
        self.is_running = False
        if self._link is None:
            return outcome
        if outcome is None:
            self._link.send(plan, result)
        else:
            self._link.send(outcome)
        return None


class Loop(Protocol):
    """What the runner's main thread drives. Another thread tells the node how it gets on, and only looks."""

    @property
    def steps(self) -> int:
        """How many have ended."""
        ...

    @property
    def is_busy(self) -> bool: ...

    @property
    def waits_for_others(self) -> bool:
        """Whether its own part of what is under way is done."""
        ...

    def handle(self, message: ServeMessage | Frame) -> None: ...

    def step(self) -> bool:
        """Does what can be done without waiting for a message; False if that is nothing."""
        ...

    def close(self, message: str) -> None:
        """Tells all clients why nothing more will come."""
        ...


class Follower:
    """Any stage but the first, and any rank above 0: runs what comes."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.steps = 0
        self.is_busy = False

    def handle(self, message: ServeMessage | Frame) -> None:
        if not (isinstance(message, Frame) and isinstance(message.message, StepPlan) and message.values is not None):
            raise ProtocolError("What came in the place of a step is none.")
        self.is_busy = True
        self._stage.run(message.message, message.values)
        self.steps, self.is_busy = self.steps + 1, False

    @property
    def waits_for_others(self) -> bool:
        return self.is_busy and not self._stage.is_running

    def step(self) -> bool:
        return False

    def close(self, message: str) -> None:
        """It has no clients."""


class Head:
    """The first stage: takes requests, plans all steps, and answers."""

    def __init__(
        self, spec: RunnerSpec, stage: Stage, tell: Callable[[Activity], None], draft: DraftModel | None = None
    ) -> None:
        self._stage = stage
        self._draft = draft
        self._tell = tell
        self.steps = 0
        self._told = Activity(0, 0)
        self._told_at = 0.0
        self._connections: dict[int, ServeConnection] = {}
        self._scheduler = Scheduler(
            slot_count=spec.slot_count,
            context_length=spec.context_length,
            stage_count=spec.stage_count,
            vocabulary_size=spec.vocabulary_size,
            looks_up=LOOKUP_OFF not in spec.engine_options.items(),
            drafter=draft,
        )

    @property
    def is_busy(self) -> bool:
        """Whether a request is under way, so that steps come back."""
        return self._scheduler.running_count > 0

    @property
    def waits_for_others(self) -> bool:
        return self.is_busy and not (self._stage.is_running or (self._draft and self._draft.is_running))

    def step(self) -> bool:
        """Starts the next step if there is one: schedule, run, learn."""
        planned = self._scheduler.schedule(time.monotonic())
        if planned is None:
            return False
        outcome = self._stage.run(planned.plan, planned.token_ids)
        if outcome is not None:
            self._learn(outcome)
        return True

    def handle(self, message: ServeMessage | Frame) -> None:
        match message:
            case Frame():
                if not isinstance(message.message, StepOutcome):
                    raise ProtocolError("The last stage sent something that is no outcome.")
                self._learn(message.message)
            case ServeCame():
                self._connections[message.connection.owner] = message.connection
            case ServeSaid():
                self._carry_out(message)
            case ServeGone():
                self._connections.pop(message.owner).close()
                self._send(self._scheduler.drop(message.owner, time.monotonic()))

    def close(self, message: str) -> None:
        """Tells everyone why nothing more will come."""
        self._send(self._scheduler.break_all(message, 503))
        deadline = time.monotonic() + FAREWELL_SECONDS
        for connection in self._connections.values():
            connection.close(max(deadline - time.monotonic(), 0.0))

    def _carry_out(self, said: ServeSaid) -> None:
        now = time.monotonic()
        if isinstance(said.command, Admit):
            self._send(self._scheduler.admit(said.owner, said.command, now))
        else:
            self._send(self._scheduler.cancel(said.owner, said.command, now))
        self._connections[said.owner].handled()

    def _learn(self, outcome: StepOutcome) -> None:
        self.steps += 1
        self._send(self._scheduler.learn(outcome, time.monotonic()))

    def _send(self, events: Events) -> None:
        """Each connection gets its events in one piece; those of connections that are gone are dropped."""
        bundles: defaultdict[int, list[HeadEvent]] = defaultdict(list)
        for owner, event in events:
            bundles[owner].append(event)
        for owner, bundle in bundles.items():
            if connection := self._connections.get(owner):
                connection.send(bundle)
        self._tell_activity()

    def _tell_activity(self) -> None:
        activity = Activity(self._scheduler.running_count, self._scheduler.queued_count)
        if activity == self._told:
            return
        now = time.monotonic()
        turned = bool(activity.running) != bool(self._told.running)
        if turned or now - self._told_at >= ACTIVITY_SECONDS:
            self._tell(activity)
            self._told = activity
            self._told_at = now
