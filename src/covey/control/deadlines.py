"""How long a runner's process may owe us something, and what is said of one that took longer.

Every phase has a limit without progress, which starts anew with each sign of it: layers and bytes while it loads,
steps while it answers. Where a process waits for others (until all stages listen) or for requests it owes nothing but
its beat, which comes from a thread that computing does not hold up. After this machine slept every limit begins anew.

Silence may be that of a machine that swaps, so it is borne for long. That a signal holds a process its node sees from
outside, and nothing else looks like it, however slow the machine is: one that is to beat is given little time then.
"""

from collections.abc import Callable
from typing import Final

from msgspec import Struct

from covey.control.runner_table import SERVING_STATES, Overdue, Runner
from covey.control.settings import PhaseLimits
from covey.schema.runner import BEAT_MS, RunnerState

BEATS_MISSED_MAX: Final = 3
SILENCE_MS: Final = 10_000  # a machine that swaps can hold up any thread for seconds; as long as a node may be silent
PARTED_SILENCE_MS: Final = 5_000  # its neighbours have left it, for its pulse or for something else
WAITING_MORE_MS: Final = 10_000  # so that what the others wait for is ended before them
HALTED_MS: Final = 1_000  # whoever stops a process for a moment has let it go on by then
REAP_MS: Final = 10_000  # a killed process ends within milliseconds, unless a driver or a disk holds it
MORE_FOR_STEPS: Final = "(COVEY_STEP_TIMEOUT_S allows more)"


class Phase(Struct, frozen=True):
    """What a process owes us in one state. `told`: for people, with `{seconds}` of the limit."""

    limit_ms: Callable[[PhaseLimits], int]
    told: Callable[[Runner], str]


PHASES: Final[dict[RunnerState, Phase]] = {
    RunnerState.IDLE: Phase(
        lambda limits: limits.connect_ms,
        lambda _: "it did not start within {seconds} s (COVEY_CONNECT_TIMEOUT_S allows more)",
    ),
    RunnerState.CONNECTING: Phase(
        lambda limits: limits.connect_ms,
        lambda _: "connecting took longer than {seconds} s (COVEY_CONNECT_TIMEOUT_S allows more)",
    ),
    RunnerState.LOADING: Phase(
        lambda limits: limits.load_ms,
        lambda runner: f"{_load_told(runner)} {{seconds}} s (COVEY_LOAD_TIMEOUT_S allows more)",
    ),
    RunnerState.WARMING_UP: Phase(
        lambda limits: limits.warm_up_ms,
        lambda _: "warming up took longer than {seconds} s (COVEY_WARM_UP_TIMEOUT_S allows more)",
    ),
    **dict.fromkeys(
        SERVING_STATES,
        Phase(
            lambda limits: limits.step_ms,
            lambda runner: f"no step ended for {{seconds}} s after {runner.steps} steps {MORE_FOR_STEPS}",
        ),
    ),
    **dict.fromkeys(
        (RunnerState.SHUTTING_DOWN, RunnerState.FAILED),
        Phase(
            lambda limits: limits.shut_down_ms + REAP_MS,
            lambda runner: (
                f"can't end process {runner.process_id} of a former try: it was killed at least {REAP_MS // 1000} s "
                "ago and is still there, so its memory stays taken (a driver or a disk holds it; restart the device)"
            ),
        ),
    ),
}


def due_ms(runner: Runner, limits: PhaseLimits) -> int | None:
    """When its process has taken too long, unless it gets further; None while it owes nothing."""
    phase = PHASES.get(runner.state)
    if phase is None or not runner.has_process:
        return None
    limit_ms = runner.phase_since_ms + phase.limit_ms(limits)
    if _ends_its_step(runner):
        since_ms = runner.phase_since_ms if runner.ending_since_ms is None else runner.ending_since_ms
        return min(max(limit_ms, since_ms + limits.step_ms), _silent_ms(runner, limits))
    if runner.state in SERVING_STATES:
        limit_ms += WAITING_MORE_MS if runner.waits_for_others else 0
        return min(limit_ms, _silent_ms(runner, limits)) if runner.is_busy else _silent_ms(runner, limits)
    waits_for_others = runner.state is RunnerState.CONNECTING and runner.linked_to is None
    return None if waits_for_others else limit_ms


def overdue(now_ms: int, runner: Runner, limits: PhaseLimits) -> Overdue | None:
    """What to tell the table of a process that has taken too long."""
    due = due_ms(runner, limits)
    if due is None or now_ms < due:
        return None
    phase = PHASES[runner.state]
    if _beats(runner) and now_ms >= _silent_ms(runner, limits):
        at = "when it was to begin anew" if _ends_its_step(runner) else "while it served"
        told = f"it gave no sign of life for {_silence_ms(runner, limits) // 1000} s {at}"
        return Overdue(told, is_silent=True)
    if _ends_its_step(runner):
        return Overdue(f"the step that it was to leave did not end within {limits.step_ms / 1000:g} s {MORE_FOR_STEPS}")
    return Overdue(phase.told(runner).format(seconds=f"{phase.limit_ms(limits) / 1000:g}"))


def halted(runner: Runner, seen_ms: int) -> Overdue | None:
    """What to tell the table of a process that was seen to be held by a signal for so long."""
    if seen_ms < HALTED_MS or not _beats(runner):
        return None
    return Overdue(f"a signal stopped it for more than {HALTED_MS / 1000:g} s (SIGSTOP)", is_silent=True)


def _beats(runner: Runner) -> bool:
    return runner.state in SERVING_STATES or _ends_its_step(runner)


def _ends_its_step(runner: Runner) -> bool:
    """Whether it was told to begin anew: it listens again once its step has ended, and beats till then."""
    return runner.state is RunnerState.IDLE and not runner.is_fresh


def _silent_ms(runner: Runner, limits: PhaseLimits) -> int:
    return runner.heard_ms + _silence_ms(runner, limits)


def _silence_ms(runner: Runner, limits: PhaseLimits) -> int:
    if _ends_its_step(runner):
        return PARTED_SILENCE_MS
    return min(SILENCE_MS, max(limits.step_ms, BEATS_MISSED_MAX * BEAT_MS))


def _load_told(runner: Runner) -> str:
    """Once all layers are read the engine packs them, of which it tells nothing on the way."""
    layers = runner.stage.shard.layer_end - runner.stage.shard.layer_start
    if runner.layers_loaded >= layers:
        return f"packing its {layers} layers, all of which are read, took longer than"
    return f"loading came no further than {runner.layers_loaded} of {layers} layers for"
