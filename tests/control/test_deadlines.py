"""Every phase of a runner has a time limit, which progress extends; past it the process ends, and nothing else does."""

from random import Random

import pytest
from msgspec.structs import replace
from runner_bench import MINE, Bench, second

from covey.control.deadlines import PHASES
from covey.control.routing import instance_status, ready_instances
from covey.control.runner_table import TABLE, Overdue
from covey.control.settings import MachineSettings, PhaseLimits
from covey.schema.cluster import Instance, InstancePhase
from covey.schema.ids import RunnerId
from covey.schema.machine import LeaveRequested, RunnerExited, RunnerHalted, RunnerStarted, StartRunner, StopRunner
from covey.schema.runner import Activity, Beat, Connected, Listening, LoadProgressed, PhaseFailed, RunnerState
from simulation.people import SMALL
from simulation.world import World

GIGABYTE = 10**9
LIMITS = PhaseLimits()
HANGS = StopRunner(MINE, 1, 2_000, asks_first=False)
IS_SILENT = StopRunner(MINE, 1, 200, asks_first=False)  # no thread of it runs that could write a last line


def in_state(state: RunnerState, stage_count: int = 1) -> Bench:
    bench = Bench(stage_count)
    bench.advance()
    bench.hear(RunnerStarted(MINE, 1, 4711))
    bench.until(state)
    assert bench.mine.state is state
    return bench


@pytest.mark.parametrize(
    ("state", "limit_ms", "reason"),
    [
        (RunnerState.IDLE, LIMITS.connect_ms, "it did not start within 30 s (COVEY_CONNECT_TIMEOUT_S allows more)"),
        (
            RunnerState.CONNECTING,
            LIMITS.connect_ms,
            "connecting took longer than 30 s (COVEY_CONNECT_TIMEOUT_S allows more)",
        ),
        (
            RunnerState.LOADING,
            LIMITS.load_ms,
            "loading came no further than 0 of 6 layers for 300 s (COVEY_LOAD_TIMEOUT_S allows more)",
        ),
        (
            RunnerState.WARMING_UP,
            LIMITS.warm_up_ms,
            "warming up took longer than 120 s (COVEY_WARM_UP_TIMEOUT_S allows more)",
        ),
        (RunnerState.READY, 10_000, "it gave no sign of life for 10 s while it served"),
    ],
)
def test_a_process_that_does_not_get_on_is_ended_and_its_story_kept(
    state: RunnerState, limit_ms: int, reason: str
) -> None:
    bench = in_state(state)
    assert bench.advance(limit_ms - 1) == []
    assert bench.runners.deadline() == bench.now_ms + 1
    assert bench.advance(1) == [IS_SILENT if state is RunnerState.READY else HANGS]
    assert bench.runners.reports()[0].reason == reason
    assert bench.hear(RunnerExited(MINE, 1, "signal 9 (killed)", "layer 3\nlayer 4")) == []
    [report] = bench.runners.reports()
    assert (report.state, report.retries_left) == (RunnerState.FAILED, 3)
    assert report.reason == f"{reason}; its process was ended: signal 9 (killed)\nlayer 3\nlayer 4"


def test_a_load_that_hangs_after_its_last_layer_says_so() -> None:
    bench = in_state(RunnerState.LOADING)
    bench.say(LoadProgressed(6, 6, 100, 100))
    assert bench.advance(LIMITS.load_ms) == [HANGS]
    assert bench.mine.reason == (
        "packing its 6 layers, all of which are read, took longer than 300 s (COVEY_LOAD_TIMEOUT_S allows more)"
    )


def test_a_load_that_gets_on_is_left_alone_however_long_it_takes() -> None:
    bench = in_state(RunnerState.LOADING)
    for number in range(1, 100):
        assert bench.advance(LIMITS.load_ms - 1) == []
        assert bench.say(LoadProgressed(number // 20, 6, number, 100)) == []
    assert bench.advance(LIMITS.load_ms - 1) == []
    bench.say(LoadProgressed(4, 6, 99, 100))  # says the same again: that is no progress
    assert bench.advance(1) == [HANGS]
    assert "no further than 4 of 6 layers" in bench.mine.reason


def test_a_stage_that_waits_for_others_owes_nothing() -> None:
    """Their files may come for hours, and while nobody asks anything no step ends."""
    bench = Bench(2)
    bench.advance()
    bench.say(Listening(7))
    assert bench.advance(10**7) == []
    bench.report(RunnerState.CONNECTING, 1, port=8)
    bench.advance()
    assert bench.advance(LIMITS.connect_ms - 1) == []
    bench.say(Connected())
    assert bench.mine.state is RunnerState.LOADING
    bench = in_state(RunnerState.READY)
    for _ in range(1_000):
        assert bench.advance(2_000) == []
        assert bench.say(Beat(7, is_busy=False)) == []


def test_a_step_that_hangs_is_found_and_a_long_one_is_not_taken_for_it() -> None:
    """A board that takes four minutes for a part of a prompt beats all the while; one that hangs does, too."""
    bench = in_state(RunnerState.READY)
    bench.say(Activity(1, 0))
    for steps in (0, 1, 2):
        for _ in range(120):
            assert bench.advance(2_000) == []
            assert bench.say(Beat(steps, is_busy=True)) == []
    for _ in range(31):
        bench.advance(2_000)
        bench.say(Beat(2, is_busy=True))
    assert bench.mine.state is RunnerState.FAILED
    assert bench.mine.reason.startswith("no step ended for 300 s after 2 steps (COVEY_STEP_TIMEOUT_S allows more)")


def test_who_waits_for_a_step_that_hangs_is_not_ended_before_it() -> None:
    ended_ms = {}
    for waits in (False, True):
        bench = in_state(RunnerState.READY)
        bench.say(Activity(1, 0))
        begun_ms = bench.now_ms
        while bench.mine.state is not RunnerState.FAILED:
            bench.say(Beat(3, is_busy=True, waits_for_others=waits))
            bench.advance(2_000)
        ended_ms[waits] = bench.now_ms - begun_ms
    assert ended_ms == {False: 300_000, True: 310_000}


def test_a_stopped_process_is_found_also_while_it_answers() -> None:
    bench = in_state(RunnerState.READY)
    bench.say(Activity(1, 0))
    bench.say(Beat(3, is_busy=True))
    assert bench.advance(9_999) == []
    assert bench.advance(1) == [IS_SILENT]
    assert bench.mine.reason == "it gave no sign of life for 10 s while it served"


@pytest.mark.parametrize(("step_ms", "silent_ms"), [(1_000, 6_000), (8_000, 8_000), (10**9, 10_000)])
def test_a_few_missed_beats_are_forgiven_whatever_limit_was_set(step_ms: int, silent_ms: int) -> None:
    bench = Bench()
    bench.runners.settings = MachineSettings(limits=PhaseLimits(step_ms=step_ms))
    bench.advance()
    bench.until_ready()
    assert bench.advance(silent_ms - 1) == []
    assert bench.advance(1) == [IS_SILENT]


@pytest.mark.parametrize("state", [state for state in PHASES if state is not RunnerState.RUNNING])
def test_after_this_machine_slept_every_limit_begins_anew(state: RunnerState) -> None:
    """Its processes slept with it, and have had no time to say anything."""
    bench = in_state(state if state not in (RunnerState.SHUTTING_DOWN, RunnerState.FAILED) else RunnerState.LOADING)
    if state is RunnerState.SHUTTING_DOWN:
        bench.instances = []
        bench.advance()
    if state is RunnerState.FAILED:
        bench.say(PhaseFailed("load", "the file is cut short"))
    bench.now_ms += 3_600_000
    bench.runners.wake(bench.now_ms, 3_600_000)
    assert bench.advance() == []
    assert bench.advance(5_900) == []
    assert bench.mine.state is state


@pytest.mark.parametrize("state", [RunnerState.READY, RunnerState.RUNNING])
def test_what_a_signal_holds_is_given_a_second(state: RunnerState) -> None:
    """That is seen from outside, and can't be a slow machine."""
    bench = in_state(RunnerState.READY)
    if state is RunnerState.RUNNING:
        bench.say(Activity(1, 0))
    assert bench.hear(RunnerHalted(MINE, 1, 500)) == []
    assert bench.hear(RunnerHalted(MINE, 2, 1_000)) == []  # of another process
    assert bench.hear(RunnerHalted(MINE, 1, 1_000)) == [IS_SILENT]
    assert bench.mine.reason == "a signal stopped it for more than 1 s (SIGSTOP)"
    assert bench.hear(RunnerHalted(MINE, 1, 1_500)) == []
    assert bench.hear(RunnerExited(MINE, 1, "signal 9 (killed)", "")) == []
    assert bench.mine.retries_left == 3


@pytest.mark.parametrize("state", [RunnerState.IDLE, RunnerState.CONNECTING, RunnerState.LOADING])
def test_what_does_not_serve_yet_has_its_time_also_while_a_signal_holds_it(state: RunnerState) -> None:
    """Nobody waits for an answer of it, and what it has read is not lost."""
    bench = in_state(state)
    assert bench.hear(RunnerHalted(MINE, 1, 20_000)) == []
    assert bench.mine.state is state


def test_that_a_process_is_held_by_a_signal_is_no_sign_of_life() -> None:
    bench = in_state(RunnerState.READY)
    bench.now_ms += 9_999
    assert bench.hear(RunnerHalted(MINE, 1, 500)) == []
    assert bench.advance(1) == [IS_SILENT]


def test_no_process_takes_the_place_of_another_before_the_memory_was_seen_without_it() -> None:
    bench = in_state(RunnerState.LOADING)
    bench.advance(LIMITS.load_ms)
    bench.runners.measure({4711: 80})
    bench.hear(RunnerExited(MINE, 1, "signal 9 (killed)", ""))
    assert bench.advance(1_000) == []
    assert bench.mine.state is RunnerState.IDLE
    bench.runners.measure({})
    [start] = bench.advance()
    assert isinstance(start, StartRunner)
    assert start.attempt == 2


# ---- what can't even be killed ----


def stuck() -> Bench:
    bench = in_state(RunnerState.LOADING)
    assert bench.advance(LIMITS.load_ms) == [HANGS]
    assert bench.advance(LIMITS.shut_down_ms + 10_000 - 1) == []
    assert bench.mine.state is RunnerState.FAILED
    assert bench.advance(1) == []
    assert bench.mine.state is RunnerState.STUCK
    return bench


def test_what_does_not_end_when_it_is_killed_is_stuck_and_people_are_told() -> None:
    bench = stuck()
    [report] = bench.runners.reports()
    assert report.waiting == (
        "can't end process 4711 of a former try: it was killed at least 10 s ago and is still there, so its memory "
        "stays taken (a driver or a disk holds it; restart the device)"
    )
    assert bench.runners.notices() == (f"this node {report.waiting}.",)
    assert bench.advance(10**9) == []
    assert bench.hear(RunnerExited(MINE, 1, "signal 9 (killed)", "")) == []
    bench.runners.measure({})
    assert bench.mine.state is RunnerState.FAILED
    [start] = bench.advance(1_000)
    assert isinstance(start, StartRunner)
    assert bench.runners.reports()[0].waiting == ""
    assert bench.runners.notices() == ()


def test_a_stuck_process_keeps_its_memory_and_holds_no_figure_up() -> None:
    """What it takes was moving as long as it was about to load or to end; nobody waits for that for ever."""
    bench = stuck()
    assert not bench.runners.is_memory_moving
    bench.instances.append(second())
    bench.runners.measure({4711: 70})
    bench.free_bytes = 139  # 110 for the second, and 30 that the first one may still take
    assert bench.advance() == []
    assert bench.runners.runners[RunnerId("j.0")].waiting != ""
    bench.free_bytes = 140
    [start] = bench.advance()
    assert isinstance(start, StartRunner)


def test_a_stuck_process_is_forgotten_with_its_assignment_once_it_is_gone_and_not_before() -> None:
    bench = stuck()
    bench.instances = []
    assert bench.advance(10**6) == []
    assert bench.mine.state is RunnerState.STUCK
    bench.exit()
    assert bench.runners.runners == {}


def test_while_a_neighbour_is_stuck_its_instance_waits_and_says_so() -> None:
    """The others give their memory back, the wish is placed elsewhere after a while, and its node can still leave."""
    world = World(Random(7))
    [ada, bea] = [world.add(name, 8 * GIGABYTE) for name in ("ada", "bea")]
    for host in (ada, bea):
        host.start()
    world.run_until(2_000)
    world.people.place(ada, SMALL, 2)
    world.run_until(12_000)
    [process] = bea.processes
    process.has_stalled, process.die = True, lambda _: None  # type: ignore[method-assign]
    world.run_until(42_000)
    assert ada.machine is not None
    assert bea.machine is not None
    assert [runner.state for runner in bea.machine.runners.runners.values()] == [RunnerState.STUCK]
    state = ada.machine.state(world.now_ms)
    [instance] = state.instances
    status = instance_status(state, instance)
    assert status.phase is InstancePhase.WAITING
    assert status.text.startswith(f"bea can't end process {process.process_id} of a former try")
    assert bea.machine.state(world.now_ms).notices == bea.machine.runners.notices() != ()
    world.run_until(70_000)
    [instance] = ready_instances(ada.machine.state(world.now_ms), SMALL.model_id)
    assert [stage.node_id for stage in instance.stages] == [ada.node_id]
    bea.tell_machine(LeaveRequested(), bea.boot)
    assert bea.machine is None


def test_memory_that_runners_of_an_instance_that_ends_hold_counts_as_given_back_but_for_stuck_ones() -> None:
    """Also while they end, and never less than nothing is held."""
    world = World(Random(7))
    ada = world.add("ada", 8 * GIGABYTE)
    ada.start()
    world.run_until(2_000)
    world.people.place(ada, SMALL)
    world.run_until(12_000)
    assert ada.machine is not None
    [instance] = ada.machine.state(world.now_ms).instances
    last = ada.machine.reporter.last
    assert last is not None
    assert last.hardware is not None
    [report] = last.runners
    free_bytes, held_bytes = last.hardware.memory_bytes_available, report.resident_bytes

    def seen(state: RunnerState, *leaving: Instance) -> tuple[int, int]:
        assert ada.machine is not None
        ada.machine.reporter.last = replace(last, runners=(replace(report, state=state),))
        [node] = ada.machine.view.candidates(world.now_ms, leaving)
        return node.memory_bytes_free, node.memory_bytes_held

    assert seen(RunnerState.READY) == (free_bytes, held_bytes)
    for state in (RunnerState.READY, RunnerState.SHUTTING_DOWN, RunnerState.FAILED):
        assert seen(state, instance) == (free_bytes + held_bytes, 0)
    assert seen(RunnerState.STUCK, instance) == (free_bytes, held_bytes)


def test_whatever_has_a_limit_can_pass_it() -> None:
    for state in PHASES:
        assert (state, Overdue) in TABLE
