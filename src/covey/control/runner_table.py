"""The life of one runner process, as a table {(state, input type): Transition}.

An instance runs as one generation: all its runners have the same attempt number. A process outlives its generation if
it can: it is regrouped, keeps its weights, and links anew. One that is stopped, for whatever reason, is reaped before
the next one starts. A pair that the table lacks is a bug and raises with its story. `docs/runner-states.md` is drawn
from this table.

A process that takes longer for its phase than `deadlines` allows is `Overdue`: it is not asked any more but ended. One
that does not end even then is stuck: it keeps its memory, and no other process takes its place before it is reaped.
"""

from collections.abc import Callable
from typing import Any, Final

from msgspec import Struct

from covey.schema.cluster import Instance, RunnerReport, Stage
from covey.schema.ids import RunnerId
from covey.schema.machine import (
    Effect,
    RegroupRunner,
    RunnerExited,
    RunnerStarted,
    StartRunner,
    StopRunner,
    TellRunner,
)
from covey.schema.model import Shard
from covey.schema.runner import (
    Activity,
    Address,
    Beat,
    Connected,
    ConnectTo,
    Listening,
    Load,
    Loaded,
    LoadProgressed,
    Parted,
    PhaseFailed,
    Ready,
    RunnerSpec,
    RunnerState,
    WarmUp,
)

IDLE, CONNECTING, CONNECTED = RunnerState.IDLE, RunnerState.CONNECTING, RunnerState.CONNECTED
LOADING, LOADED, WARMING_UP = RunnerState.LOADING, RunnerState.LOADED, RunnerState.WARMING_UP
READY, RUNNING, PARTED = RunnerState.READY, RunnerState.RUNNING, RunnerState.PARTED
SHUTTING_DOWN, STUCK = RunnerState.SHUTTING_DOWN, RunnerState.STUCK
FAILED, SHUTDOWN = RunnerState.FAILED, RunnerState.SHUTDOWN

STARTED_STATES: Final = (IDLE, CONNECTING, CONNECTED, LOADING, LOADED, WARMING_UP, READY, RUNNING, PARTED)
REGROUPED_STATES: Final = (CONNECTING, CONNECTED, LOADED, READY, RUNNING, PARTED)  # in the others it can't listen now
LINKING_STATES: Final = (IDLE, CONNECTING)  # until all runners of its generation are there
ENDING_STATES: Final = (SHUTTING_DOWN, FAILED)  # its process, if it has one, was told to end
MOVING_STATES: Final = (LOADING, *ENDING_STATES)  # its process, if it has one, takes or gives back memory
LOADED_STATES: Final = (LOADED, WARMING_UP, READY, RUNNING, PARTED)
SERVING_STATES: Final = (READY, RUNNING)
WARMED_BY_ALL_STATES: Final = (LOADED, WARMING_UP, *SERVING_STATES)  # its weights are there, and so are its links
MEASURED_STATES: Final = (*LOADED_STATES, STUCK)  # what it holds is known, and what it will still take is the rest
HUNG_GRACE_MS: Final = 2_000  # between SIGTERM and SIGKILL for a process that did not get on: long enough for its log
SILENT_GRACE_MS: Final = 200  # for one none of whose threads runs: it has no more to say
LOG_TAIL_CHARACTERS_MAX: Final = 2_000

ProcessKey = tuple[RunnerId, int]  # of a process: the runner and the attempt that it was started as


class Runner(Struct):
    """One runner assigned to this node. `attempt` is the generation of its process, or of the one to come."""

    instance: Instance
    stage: Stage
    grace_ms: int
    state: RunnerState = IDLE
    attempt: int = 0
    has_process: bool = False
    process_key: ProcessKey | None = None  # what that was started as: it may have served others before
    is_inherited: bool = False  # that is another runner's still: it has taken part in no generation of this one
    holds: Shard | None = None  # what it has loaded, or was told to
    process_id: int = 0  # of that, once it is known
    wanted: bool = True
    is_seen_gone: bool = True  # the memory was looked at since its last process ended
    last_attempt: int = 0  # that a process took part in
    started_ms: int | None = None  # when that was started
    serving_since_ms: int | None = None
    working_beats: int = 0  # since then: those that told of a further step
    was_well: bool = False  # until now: what goes wrong then is tried again at once, and costs none of its budget
    has_failed: bool = False  # and its back-off is not over, also while it is not assigned
    retries_left: int = 0
    retry_ms: int | None = None  # when FAILED ends (None: never, or not before it is reaped), or PARTED at last
    partings: int = 0  # since it was last well for a while
    listen_host: str = ""
    data_address: Address | None = None
    linked_to: tuple[tuple[int, int], ...] | None = None  # whom it links to: which runner, and the boot of its node
    layers_loaded: int = 0
    bytes_loaded: int = 0
    steps: int = 0  # that it has finished in its life
    is_busy: bool = False  # with a step; the head: with a request
    waits_for_others: bool = False  # its own part of that is done
    phase_since_ms: int = 0  # when its phase began, or last got further, or its machine woke
    progressed_ms: int = 0  # the same but for waking
    ending_since_ms: int | None = None  # the same, of the step that it was in when it was told to begin anew
    progress: tuple[object, ...] = ()  # as it was then
    heard_ms: int = 0  # when its process last said something
    is_overdue: bool = False  # it was ended because it did not get further
    resident_bytes: int = 0
    requests_running: int = 0
    requests_queued: int = 0
    reason: str = ""
    waiting: str = ""  # while it can't start, for lack of memory or because it is stuck: what its node says of that

    def report(self) -> RunnerReport:
        shard = self.stage.shard
        return RunnerReport(
            runner_id=self.stage.runner_id,
            instance_id=self.instance.instance_id,
            state=self.state,
            attempt=self.attempt,
            retries_left=self.retries_left,
            data_address=self.data_address,
            layers_loaded=self.layers_loaded,
            layers_total=shard.layer_end - shard.layer_start,
            resident_bytes=self.resident_bytes,
            requests_running=self.requests_running,
            requests_queued=self.requests_queued,
            reason=self.reason,
            waiting=self.waiting,
        )

    @property
    def is_fresh(self) -> bool:
        """Whether its process is in its first generation."""
        return self.process_key == (self.stage.runner_id, self.attempt)

    @property
    def key(self) -> ProcessKey:
        """What its process is known as to the driver."""
        return self.process_key or (self.stage.runner_id, self.attempt)


def inherit(heir: Runner, donor: Runner) -> None:
    """Gives `heir` the process of `donor`, which has none then, nor what that has done."""
    heir.state = PARTED if donor.state in REGROUPED_STATES else donor.state
    heir.has_process, heir.process_id, heir.process_key, heir.is_inherited = True, donor.process_id, donor.key, True
    heir.holds, heir.resident_bytes, heir.listen_host = donor.holds, donor.resident_bytes, donor.listen_host
    heir.started_ms, heir.heard_ms, heir.phase_since_ms = donor.started_ms, donor.heard_ms, donor.phase_since_ms
    heir.layers_loaded, heir.bytes_loaded = donor.layers_loaded, donor.bytes_loaded
    _forget_process(donor)
    donor.state, donor.retry_ms, donor.is_seen_gone = IDLE, None, True
    donor.serving_since_ms, donor.working_beats = None, 0


# ---- what the node itself decides ----


class Begin(Struct, frozen=True):
    """Its file is here and its generation is open: start a process."""

    attempt: int
    spec: RunnerSpec
    now_ms: int


class Regroup(Struct, frozen=True):
    """Its generation is over: its process takes part in the next one, with what it has loaded."""

    attempt: int
    spec: RunnerSpec


class Link(Struct, frozen=True):
    """All runners listen, in the same generation; `boots` are those of the nodes of those that this one links to, by
    their places in the instance.
    """

    boots: tuple[tuple[int, int], ...]
    following: tuple[Address, ...]  # in the order to be tried
    before: tuple[Address, ...]
    ranks: tuple[tuple[Address, ...], ...] = ()


class Proceed(Struct, frozen=True):
    """On to the next phase."""


class Stop(Struct, frozen=True):
    """Unassigned, or its generation is over."""


class Retry(Struct, frozen=True):
    """The back-off after a failure is over."""

    attempt: int


class Overdue(Struct, frozen=True):
    """Its process has taken too long for what it is to do now; `is_silent`: it does not even beat."""

    reason: str
    is_silent: bool = False


Outcome = tuple[RunnerState, list[Effect]]
Handler = Callable[[Runner, Any], Outcome]


class Transition(Struct, frozen=True):
    """What handles an input, and the states that it may end in."""

    handler: Handler
    targets: tuple[RunnerState, ...]


class UnexpectedInputError(AssertionError):
    """The table has no such pair."""


def has_given_up(report: RunnerReport) -> bool:
    """Whether it has failed and is not started again before a person does something about it."""
    return report.state is FAILED and not report.retries_left


def can_step(runner: Runner, news: Any) -> bool:
    """Whether the table has this pair. Late words of a former generation come only from a process that was in one."""
    is_stale = runner.state is IDLE and type(news) in STALE_WORDS
    return (runner.state, type(news)) in TABLE and not (is_stale and runner.is_fresh)


def step(runner: Runner, news: Any) -> list[Effect]:
    """Takes one input through the table."""
    transition = TABLE.get((runner.state, type(news)))
    if transition is None:
        story = f"runner {runner.stage.runner_id} (attempt {runner.attempt}) got {news!r} in state {runner.state}"
        raise UnexpectedInputError(story)
    target, effects = transition.handler(runner, news)
    if target not in transition.targets:
        raise UnexpectedInputError(f"{runner.state} -> {target} on {type(news).__name__} is not in the table")
    runner.state = target
    return effects


# ---- handlers ----


def _begin(runner: Runner, news: Begin) -> Outcome:
    if runner.has_process or news.attempt <= runner.last_attempt:
        raise UnexpectedInputError(f"attempt {news.attempt} of {runner.stage.runner_id} follows {runner.last_attempt}")
    runner.attempt = runner.last_attempt = news.attempt
    runner.has_process, runner.started_ms, runner.waiting, runner.was_well = True, news.now_ms, "", False
    runner.process_key = (runner.stage.runner_id, runner.attempt)
    runner.listen_host = news.spec.listen_host
    return IDLE, [StartRunner(*runner.key, news.spec)]


def _regroup(runner: Runner, news: Regroup) -> Outcome:
    if news.attempt <= runner.last_attempt:
        raise UnexpectedInputError(f"attempt {news.attempt} of {runner.stage.runner_id} follows {runner.last_attempt}")
    runner.attempt = runner.last_attempt = news.attempt
    runner.retry_ms, runner.waiting, runner.is_inherited, runner.was_well = None, "", False, False
    runner.ending_since_ms = runner.phase_since_ms if runner.is_busy else None
    _leave_generation(runner)
    return IDLE, [RegroupRunner(*runner.key, news.spec)]


def _parted(runner: Runner, news: Parted) -> Outcome:
    runner.reason, runner.partings = news.reason, runner.partings + 1
    _leave_generation(runner)
    return PARTED, []


def _stay(runner: Runner, _: Any) -> Outcome:
    return runner.state, []


def _started(runner: Runner, news: RunnerStarted) -> Outcome:
    runner.process_id = news.process_id
    return runner.state, []


def _listening(runner: Runner, news: Listening) -> Outcome:
    runner.ending_since_ms = None
    runner.data_address = Address(runner.listen_host, news.port)
    return CONNECTING, []


def _link(runner: Runner, news: Link) -> Outcome:
    runner.linked_to = news.boots
    return CONNECTING, [_tell(runner, ConnectTo(news.following, news.before, news.ranks))]


def _connected(_: Runner, __: Connected) -> Outcome:
    return CONNECTED, []


def _load(runner: Runner, _: Proceed) -> Outcome:
    runner.holds = runner.stage.shard
    return LOADING, [_tell(runner, Load())]


def _load_progressed(runner: Runner, news: LoadProgressed) -> Outcome:
    runner.layers_loaded, runner.bytes_loaded = news.layers_loaded, news.bytes_loaded
    return LOADING, []


def _loaded(runner: Runner, news: Loaded) -> Outcome:
    runner.layers_loaded = runner.stage.shard.layer_end - runner.stage.shard.layer_start
    runner.resident_bytes = news.resident_bytes
    return LOADED, []


def _warm_up(runner: Runner, _: Proceed) -> Outcome:
    return WARMING_UP, [_tell(runner, WarmUp())]


def _ready(runner: Runner, _: Ready) -> Outcome:
    runner.reason = ""
    return READY, []


def _activity(runner: Runner, news: Activity) -> Outcome:
    runner.requests_running, runner.requests_queued = news.running, news.queued
    return (RUNNING if news.running or news.queued else READY), []


def _beat(runner: Runner, news: Beat) -> Outcome:
    runner.working_beats += news.steps > runner.steps
    runner.steps, runner.is_busy, runner.waits_for_others = news.steps, news.is_busy, news.waits_for_others
    return runner.state, []


def _overdue(runner: Runner, news: Overdue) -> Outcome:
    runner.retry_ms = None
    runner.has_failed, runner.is_overdue, runner.reason = True, True, news.reason
    grace_ms = min(runner.grace_ms, SILENT_GRACE_MS if news.is_silent else HUNG_GRACE_MS)
    return FAILED, [StopRunner(*runner.key, grace_ms, asks_first=False)]


def _stuck(runner: Runner, news: Overdue) -> Outcome:
    runner.waiting = news.reason
    runner.resident_bytes = runner.resident_bytes or 1  # the next probe reads it; until then no figure is fresh
    return STUCK, []


def _phase_failed(runner: Runner, news: PhaseFailed) -> Outcome:
    runner.retry_ms = None
    runner.has_failed, runner.reason = True, f"{news.phase}: {news.reason}"
    return FAILED, [_stop_effect(runner)]


def _crashed(runner: Runner, news: RunnerExited) -> Outcome:
    runner.retry_ms = None
    _forget_process(runner)
    runner.has_failed, runner.reason = True, _with_log(f"the runner ended: {news.description}", news.log_tail)
    return FAILED, []


def _failed_and_gone(runner: Runner, news: RunnerExited) -> Outcome:
    _close_reason(runner, news)
    _forget_process(runner)
    return FAILED, []


def _stop(runner: Runner, _: Stop) -> Outcome:
    runner.retry_ms = None
    if runner.has_process:
        return SHUTTING_DOWN, [_stop_effect(runner)]
    return SHUTDOWN, []


def _stop_failed(runner: Runner, _: Stop) -> Outcome:
    return (SHUTTING_DOWN if runner.has_process else SHUTDOWN), []  # a failed process was asked to stop already


def _stopped(runner: Runner, news: RunnerExited) -> Outcome:
    if runner.has_failed:
        _close_reason(runner, news)
    _forget_process(runner)
    if not runner.wanted:
        return SHUTDOWN, []
    return (FAILED if runner.has_failed else IDLE), []  # it was assigned again before its process had ended


def _retry(runner: Runner, news: Retry) -> Outcome:
    runner.attempt, runner.retry_ms = news.attempt, None
    runner.retries_left -= not runner.was_well
    runner.has_failed = runner.was_well = False
    return IDLE, []


def _tell(runner: Runner, command: ConnectTo | Load | WarmUp) -> TellRunner:
    return TellRunner(*runner.key, command)


def _stop_effect(runner: Runner) -> StopRunner:
    return StopRunner(*runner.key, runner.grace_ms)


def _leave_generation(runner: Runner) -> None:
    runner.data_address = runner.linked_to = None
    runner.requests_running = runner.requests_queued = runner.steps = 0
    runner.is_busy = runner.waits_for_others = False


def _forget_process(runner: Runner) -> None:
    _leave_generation(runner)
    runner.has_process, runner.process_id, runner.process_key, runner.holds = False, 0, None, None
    runner.is_inherited, runner.ending_since_ms = False, None
    runner.layers_loaded = runner.bytes_loaded = runner.resident_bytes = 0
    runner.is_seen_gone, runner.is_overdue, runner.waiting = False, False, ""


def _close_reason(runner: Runner, news: RunnerExited) -> None:
    """How the process ended, and its log, are no news where it said itself why it would."""
    if runner.is_overdue:
        ended = f"{runner.reason}; its process was ended: {news.description}"
        runner.reason = _with_log(ended, news.log_tail)


def _with_log(sentence: str, log_tail: str) -> str:
    tail = log_tail.strip()[-LOG_TAIL_CHARACTERS_MAX:]
    return f"{sentence}\n{tail}" if tail else sentence


# ---- the table ----

PROCESS_WORDS: Final = (
    Listening,
    Connected,
    LoadProgressed,
    Loaded,
    Ready,
    Activity,
    Beat,
    Parted,
    PhaseFailed,
)  # all it can say
STALE_WORDS: Final = tuple(word for word in PROCESS_WORDS if word not in (Listening, PhaseFailed))
LINKED_STATES: Final = (CONNECTING, CONNECTED, LOADING, LOADED, WARMING_UP, READY, RUNNING)

TABLE: Final[dict[tuple[RunnerState, type], Transition]] = {
    (IDLE, Begin): Transition(_begin, (IDLE,)),
    (IDLE, Listening): Transition(_listening, (CONNECTING,)),
    (CONNECTING, Link): Transition(_link, (CONNECTING,)),
    (CONNECTING, Connected): Transition(_connected, (CONNECTED,)),
    (CONNECTED, Proceed): Transition(_load, (LOADING,)),
    (LOADING, LoadProgressed): Transition(_load_progressed, (LOADING,)),
    (LOADING, Loaded): Transition(_loaded, (LOADED,)),
    (LOADED, Proceed): Transition(_warm_up, (WARMING_UP,)),
    (WARMING_UP, Ready): Transition(_ready, (READY,)),
    (READY, Activity): Transition(_activity, (READY, RUNNING)),
    (RUNNING, Activity): Transition(_activity, (READY, RUNNING)),
    **{(state, Beat): Transition(_beat, (state,)) for state in STARTED_STATES},
    **{(state, Parted): Transition(_parted, (PARTED,)) for state in LINKED_STATES},
    **{(state, Regroup): Transition(_regroup, (IDLE,)) for state in REGROUPED_STATES},
    # What a process said before it heard that it is to begin anew is no news.
    **{(IDLE, word): Transition(_stay, (IDLE,)) for word in STALE_WORDS},
    **{(PARTED, word): Transition(_stay, (PARTED,)) for word in STALE_WORDS},
    **{(state, Overdue): Transition(_overdue, (FAILED,)) for state in (IDLE, CONNECTING, LOADING, WARMING_UP)},
    **{(state, Overdue): Transition(_overdue, (FAILED,)) for state in SERVING_STATES},
    **{(state, Overdue): Transition(_stuck, (STUCK,)) for state in ENDING_STATES},
    **{(state, RunnerStarted): Transition(_started, (state,)) for state in (IDLE, *ENDING_STATES, STUCK)},
    **{(state, PhaseFailed): Transition(_phase_failed, (FAILED,)) for state in STARTED_STATES},
    **{(state, RunnerExited): Transition(_crashed, (FAILED,)) for state in STARTED_STATES},
    (IDLE, Stop): Transition(_stop, (SHUTTING_DOWN, SHUTDOWN)),
    **{(state, Stop): Transition(_stop, (SHUTTING_DOWN,)) for state in STARTED_STATES if state is not IDLE},
    # What a process said before it heard that it is to stop is no news.
    **{(state, word): Transition(_stay, (state,)) for state in (*ENDING_STATES, STUCK) for word in PROCESS_WORDS},
    **{(state, Stop): Transition(_stay, (state,)) for state in (SHUTTING_DOWN, STUCK)},
    **{(state, RunnerExited): Transition(_stopped, (IDLE, FAILED, SHUTDOWN)) for state in (SHUTTING_DOWN, STUCK)},
    (FAILED, RunnerExited): Transition(_failed_and_gone, (FAILED,)),
    (FAILED, Stop): Transition(_stop_failed, (SHUTTING_DOWN, SHUTDOWN)),
    (FAILED, Retry): Transition(_retry, (IDLE,)),
}


def diagram() -> str:
    """The table as a Mermaid state diagram. Inputs that change nothing are left out."""
    labels: dict[tuple[RunnerState, RunnerState], list[str]] = {}
    for (state, kind), transition in TABLE.items():
        for target in transition.targets:
            if target is not state:
                labels.setdefault((state, target), []).append(kind.__name__)
    order = list(RunnerState)
    edges = sorted(labels, key=lambda edge: (order.index(edge[0]), order.index(edge[1])))
    lines = [f"    {source} --> {target}: {', '.join(sorted(labels[source, target]))}" for source, target in edges]
    return "\n".join(["stateDiagram-v2", f"    [*] --> {IDLE}", *lines, f"    {SHUTDOWN} --> [*]"]) + "\n"
