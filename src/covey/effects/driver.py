"""The loop around a node's control machine: takes what comes in, lets the machine decide, carries out the rest.

One consumer, so the machine is never entered twice. An effect never raises into the loop: what goes wrong in the
world comes back as an input. Between two inputs the driver sleeps until the machine's own deadline; nobody polls.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Protocol

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup

from covey.effects.clock import Clock
from covey.effects.fetching import FetchError
from covey.effects.mailbox import Mailbox
from covey.effects.store import Restored, StoreError
from covey.schema.cluster import (
    ApiKey,
    ClusterState,
    Command,
    CommandOutcome,
    CommandResult,
    Entry,
    MeshMessage,
    Refused,
)
from covey.schema.ids import ModelId, NodeId
from covey.schema.machine import (
    AnswerCommand,
    CancelFetch,
    CommandSubmitted,
    DeadlinePassed,
    Effect,
    EntriesKept,
    FetchFailed,
    FetchFinished,
    FetchProgressed,
    Input,
    KeepEntries,
    KeepingFailed,
    LeaveRequested,
    Left,
    Publish,
    RegroupRunner,
    SendTo,
    Started,
    StartFetch,
    StartRunner,
    StateChanged,
    StopRunner,
    TellRunner,
)
from covey.schema.model import ModelCard

_log = logging.getLogger(__name__)

SNAPSHOT_AGE_MS_MAX: Final = 500  # "heard so long ago" grows with time alone

_LEAVING: Final = Refused("this node is shutting down; ask another node, or this one when it is back", 503)


class ControlMachine(Protocol):
    def handle(self, now_ms: int, news: Input) -> list[Effect]: ...
    def deadline(self) -> int | None: ...
    def state(self, now_ms: int) -> ClusterState: ...
    def keys(self) -> tuple[ApiKey, ...]: ...


class Messages(Protocol):
    def publish(self, message: MeshMessage) -> None: ...
    def send_to(self, target: NodeId, message: MeshMessage) -> None: ...


class Runners(Protocol):
    def start(self, effect: StartRunner) -> None: ...
    def tell(self, effect: TellRunner | RegroupRunner) -> None: ...
    def stop(self, effect: StopRunner) -> None: ...


class Models(Protocol):
    async def ensure(self, card: ModelCard, progress: Callable[[int, int], None]) -> Path:
        """Raises `FetchError`."""
        ...


class Store(Protocol):
    restored: Restored

    def keep(self, entries: Mapping[str, Entry | None]) -> None:
        """Raises `StoreError`. Called in a thread, one call at a time."""
        ...


class Driver:
    """`command_prefix` makes the ids of commands differ from those of other nodes and of earlier lives."""

    def __init__(
        self,
        machine: ControlMachine,
        mailbox: Mailbox,
        messages: Messages,
        models: Models,
        store: Store,
        *,
        clock: Clock,
        command_prefix: str,
    ) -> None:
        self._machine = machine
        self._mailbox = mailbox
        self._messages = messages
        self._models = models
        self._store = store
        self._keeping_fails = False
        self._clock = clock
        self._command_prefix = command_prefix
        self._command_count = 0
        self._answers: dict[str, asyncio.Future[CommandOutcome]] = {}
        self._fetches: dict[tuple[ModelId, int], anyio.CancelScope] = {}
        self._snapshot = machine.state(clock())
        self._snapshot_ms = clock()
        self._changed = anyio.Event()
        self._has_left = False
        self._left_because = ""

    async def run(self, open_runners: Callable[[TaskGroup], Runners]) -> str:
        """Until the machine has left: returns why, if nobody asked it to. Cancelling it ends every fetch and every
        runner, reaped.
        """
        try:
            async with anyio.create_task_group() as tasks:
                runners = open_runners(tasks)
                restored = self._store.restored
                self._handle(Started(restored.entries, restored.forget_until), tasks, runners)
                while not self._has_left:
                    self._handle(await self._next(), tasks, runners)
                tasks.cancel_scope.cancel()
        finally:
            self._refuse_rest()
        return self._left_because

    async def submit(self, command: Command) -> CommandResult:
        """The outcome, by exactly one answer of the machine."""
        self._command_count += 1
        command_id = f"{self._command_prefix}-{self._command_count}"
        if self._has_left:
            return CommandResult(command_id, _LEAVING)
        answer = self._answers[command_id] = asyncio.get_running_loop().create_future()
        try:
            await self._mailbox.put(CommandSubmitted(command_id, command))
            return CommandResult(command_id, await answer)
        finally:
            self._answers.pop(command_id, None)

    async def leave(self) -> None:
        await self._mailbox.put(LeaveRequested())

    def state(self) -> ClusterState:
        now_ms = self._clock()
        if now_ms - self._snapshot_ms > SNAPSHOT_AGE_MS_MAX:
            self._take_snapshot(now_ms)
        return self._snapshot

    def keys(self) -> tuple[ApiKey, ...]:
        return self._machine.keys()

    async def wait_changed(self, revision: int, timeout_s: float) -> None:
        """Returns when the state's revision differs from `revision`, at the latest after `timeout_s`."""
        with anyio.move_on_after(timeout_s):
            while self.state().revision == revision:
                await self._changed.wait()

    async def _next(self) -> Input:
        """The oldest input, or word that the machine's deadline has come."""
        deadline_ms = self._machine.deadline()
        wait_s = None if deadline_ms is None else max(0, deadline_ms - self._clock()) / 1000
        return await self._mailbox.take(wait_s) or DeadlinePassed()

    def _handle(self, item: Input, tasks: TaskGroup, runners: Runners) -> None:
        now_ms = self._clock()
        for effect in self._machine.handle(now_ms, item):
            self._carry_out(effect, now_ms, tasks, runners)

    def _carry_out(self, effect: Effect, now_ms: int, tasks: TaskGroup, runners: Runners) -> None:
        match effect:
            case Publish(message):
                self._messages.publish(message)
            case SendTo(target, message):
                self._messages.send_to(target, message)
            case AnswerCommand(command_id, outcome):
                self._answer(command_id, outcome)
            case KeepEntries():
                tasks.start_soon(self._keep, effect)
            case StartFetch():
                self._start_fetch(effect, tasks)
            case CancelFetch(model_id, attempt):
                self._cancel_fetch(model_id, attempt)
            case StateChanged():
                self._take_snapshot(now_ms)
            case Left(reason):
                self._has_left, self._left_because = True, reason
            case _:
                _carry_out_at_runner(effect, runners)

    def _take_snapshot(self, now_ms: int) -> None:
        revision = self._snapshot.revision
        self._snapshot, self._snapshot_ms = self._machine.state(now_ms), now_ms
        if self._snapshot.revision != revision:
            self._changed.set()
            self._changed = anyio.Event()

    def _answer(self, command_id: str, outcome: CommandOutcome) -> None:
        answer = self._answers.get(command_id)
        if answer is not None and not answer.done():  # else whoever asked has gone
            answer.set_result(outcome)

    def _refuse_rest(self) -> None:
        self._has_left = True
        for command_id in list(self._answers):
            self._answer(command_id, _LEAVING)

    # ---- intent ----

    async def _keep(self, effect: KeepEntries) -> None:
        """In a thread, since a disk may be slow; what has begun there is waited for, even at the end."""
        try:
            await anyio.to_thread.run_sync(self._store.keep, effect.entries)
        except StoreError as error:
            if not self._keeping_fails:  # once until it goes well again
                _log.warning("%s", error)
            self._keeping_fails = True
            await self._mailbox.put(KeepingFailed(effect.token, str(error)))
        else:
            self._keeping_fails = False
            await self._mailbox.put(EntriesKept(effect.token))

    # ---- fetches ----

    def _start_fetch(self, effect: StartFetch, tasks: TaskGroup) -> None:
        key = (effect.card.model_id, effect.attempt)
        if key not in self._fetches:  # else it is carried out already
            self._fetches[key] = anyio.CancelScope()
            tasks.start_soon(self._fetch, effect, self._fetches[key], name=f"fetch {effect.card.model_id}")

    def _cancel_fetch(self, model_id: ModelId, attempt: int) -> None:
        scope = self._fetches.get((model_id, attempt))
        if scope is not None:
            scope.cancel()

    async def _fetch(self, effect: StartFetch, scope: anyio.CancelScope) -> None:
        try:
            with scope:
                await self._mailbox.put(await self._fetched(effect.card, effect.attempt))
        finally:
            del self._fetches[effect.card.model_id, effect.attempt]

    async def _fetched(self, card: ModelCard, attempt: int) -> FetchFinished | FetchFailed:
        def progress(bytes_done: int, bytes_total: int) -> None:
            self._mailbox.offer(FetchProgressed(card.model_id, attempt, bytes_done, bytes_total))

        try:
            path = await self._models.ensure(card, progress)
        except FetchError as error:
            return FetchFailed(card.model_id, attempt, str(error), error.is_final, error.is_damaged)
        except Exception as error:  # noqa: BLE001 (the top of this task: the machine must hear of it, and the rest goes on)
            _log.exception("fetching %s failed", card.model_id)
            return FetchFailed(card.model_id, attempt, f"{type(error).__name__}: {error}; this node's log says more")
        return FetchFinished(card.model_id, attempt, str(path), card.file_bytes)


def _carry_out_at_runner(effect: StartRunner | RegroupRunner | TellRunner | StopRunner, runners: Runners) -> None:
    match effect:
        case StartRunner():
            runners.start(effect)
        case TellRunner() | RegroupRunner():
            runners.tell(effect)
        case StopRunner():
            runners.stop(effect)
