"""The lifecycle of runners: the table, and the rules by which a pipeline finds one generation."""

import os
from pathlib import Path

import pytest
from msgspec.structs import replace
from runner_bench import ME, MINE, OTHER, Bench, instance, second

from covey.control.runner_table import TABLE, Begin, Retry, Runner, Stop, UnexpectedInputError, diagram, step
from covey.schema.cluster import Instance, Stage
from covey.schema.ids import InstanceId, ModelId, RunnerId
from covey.schema.machine import RegroupRunner, RunnerExited, RunnerStarted, StartRunner, StopRunner, TellRunner
from covey.schema.model import KvCacheType, Quantizing, Shard
from covey.schema.runner import (
    BEAT_MS,
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
    RunnerState,
    WarmUp,
)

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "runner-states.md"
PAGE_TEXT = """# The states of a runner

Drawn from the table in `src/covey/control/runner_table.py`; `COVEY_UPDATE_GOLDEN=1 make test` draws it again. Inputs
that change nothing are left out. `Begin`, `Regroup`, `Link`, `Proceed`, `Stop`, `Retry` and `Overdue` are what the node
itself decides, the others are what the process says or does.

```mermaid
{diagram}```

## Time limits

`Overdue` comes when a process has got no further for this long (`src/covey/control/deadlines.py`). Each sign of
progress begins the time anew, and so does a sleep of the machine.

| state | what it owes | limit | environment variable of `covey up` |
|---|---|---|---|
| Idle, with a process | to listen | 30 s | `COVEY_CONNECT_TIMEOUT_S` |
| Connecting, once all stages listen | links to its neighbours | 30 s | `COVEY_CONNECT_TIMEOUT_S` |
| Loading | the next layer; after the last one, to have packed them all | 300 s | `COVEY_LOAD_TIMEOUT_S` |
| WarmingUp | the end of one short prompt | 120 s | `COVEY_WARM_UP_TIMEOUT_S` |
| Ready, Running | the end of a step, while it is busy | 300 s, waiting for others 310 s | `COVEY_STEP_TIMEOUT_S` |
| Ready, Running | a beat every 2 s | 10 s, or less if a step has less | |
| Idle, once its neighbours have left it | a beat every 2 s, while it ends its step | 5 s | |
| Idle, once its neighbours have left it | its end | 300 s in all, at least 30 s | `COVEY_STEP_TIMEOUT_S` |
| ShuttingDown, Failed | its end | 6 s, then it is killed | `COVEY_SHUTDOWN_TIMEOUT_S` |
| ShuttingDown, Failed | to be gone after it was killed | 10 s, then it is Stuck | |

Where several ranks share layers, a runner stays Loaded, without a limit of its own, until all ranks of its stage have
loaded: they warm up together.

Each of the variables takes a number of seconds from 1 to 86400, which is a day.

A process that is overdue is not asked to end: it gets SIGTERM, and SIGKILL 2 s later, or after half of
`COVEY_SHUTDOWN_TIMEOUT_S` if that is less; where it does not even beat, 0.2 s later. What it was at, how far it had
come, how it ended and the last lines of its log are the reason that API errors and `GET /cluster` show; `covey ps`
shows the first line of it. Where a process said itself why it failed, its log is left out.

What has failed is tried again after 1, 4 and 16 s, and then it has failed for good. A runner that was well until it
failed is tried again at once and has all three tries back: it was well if it had served for 60 s, or two of its beats
had told of further steps. One that has come to serve is not given up, but tried again every 16 s: a request may have
killed it, and that is given up after three tries. `covey place` of a model that has failed for good places it anew.
The next one starts when it is reaped and the memory was looked at without it. While one is Stuck its memory counts as
taken, the rest of its instance gives its own back, `covey nodes` names the process, and after a minute the model is
placed on other nodes if it fits there.
"""


def test_the_engine_is_told_to_be_exact() -> None:
    bench = Bench()
    bench.instances[0] = replace(bench.instances[0], exact=True)
    [start] = bench.advance()
    assert isinstance(start, StartRunner)
    assert start.spec.engine_options == {"exact": "1"}


def test_the_engine_is_told_to_quantise() -> None:
    bench = Bench()
    bench.instances[0] = replace(bench.instances[0], quantize=Quantizing.Q4)
    [start] = bench.advance()
    assert isinstance(start, StartRunner)
    assert start.spec.engine_options == {"quantize": "q4"}


def test_the_engine_is_told_what_to_keep_keys_and_values_as() -> None:
    bench = Bench()
    bench.instances[0] = replace(bench.instances[0], kv_cache=KvCacheType.F16)
    [start] = bench.advance()
    assert isinstance(start, StartRunner)
    assert start.spec.engine_options == {"kv_cache": "f16"}


def test_one_runner_from_assignment_to_ready() -> None:
    bench = Bench()
    [start] = bench.advance()
    assert isinstance(start, StartRunner)
    assert (start.attempt, start.spec.model_path, start.spec.stage_count) == (1, "/small.gguf", 1)
    bench.hear(RunnerStarted(MINE, 1, 4711))
    assert bench.mine.state is RunnerState.IDLE
    here = Address("127.0.0.1", 7)
    assert bench.say(Listening(7)) == [TellRunner(MINE, 1, ConnectTo((here,), (here,)))]
    assert bench.say(Connected()) == [TellRunner(MINE, 1, Load())]
    assert bench.say(LoadProgressed(3, 6, 1, 2)) == []
    assert bench.runners.reports()[0].layers_loaded == 3
    assert bench.say(Loaded(55)) == [TellRunner(MINE, 1, WarmUp())]
    bench.say(Ready())
    assert bench.mine.state is RunnerState.READY
    bench.say(Activity(1, 2))
    assert bench.mine.state is RunnerState.RUNNING
    bench.say(Activity(0, 0))
    assert bench.runners.reports()[0].resident_bytes == 55


def test_nothing_starts_before_the_file_is_there() -> None:
    bench = Bench()
    bench.paths = {}
    assert bench.advance() == []
    bench.paths = {ModelId("small"): "/small.gguf"}
    assert len(bench.advance()) == 1


def test_an_unassigned_runner_is_stopped_reaped_and_forgotten() -> None:
    bench = Bench()
    bench.advance()
    bench.until_ready()
    bench.instances = []
    assert bench.advance() == [StopRunner(MINE, 1, 3_000)]
    assert bench.advance(15_000) == []
    assert bench.mine.state is RunnerState.SHUTTING_DOWN
    bench.exit()
    assert bench.runners.runners == {}


def test_a_runner_that_is_assigned_again_goes_on_counting_its_attempts() -> None:
    """Its instance was dormant while a node was gone; what its former process says late must be known as stale."""
    bench = Bench()
    bench.advance()
    assigned, bench.instances = bench.instances, []
    bench.advance()
    bench.exit()
    bench.instances = assigned
    assert bench.advance() == []  # within a second of its last start
    [start] = bench.advance(1_000)
    assert isinstance(start, StartRunner)
    assert start.attempt == 2


def test_a_failed_runner_that_is_assigned_again_waits_out_its_back_off_first() -> None:
    """Its instance was dormant for a moment, while a neighbour's node restarted: that is no fresh start."""
    bench = Bench()
    bench.advance()
    bench.exit()
    assigned, bench.instances = bench.instances, []
    bench.advance(200)
    assert bench.runners.runners == {}
    bench.instances = assigned
    assert bench.advance(700) == []  # the back-off is 1 s
    assert bench.mine.state is RunnerState.FAILED
    [start] = bench.advance(200)
    assert isinstance(start, StartRunner)
    assert start.attempt == 2
    assert bench.mine.retries_left == 2


def test_a_runner_that_failed_for_good_stays_failed_when_it_is_assigned_again() -> None:
    bench = Bench()
    bench.advance()
    for attempt in (1, 2, 3, 4):
        bench.exit(attempt)
        bench.advance(16_000)
    assigned, bench.instances = bench.instances, []
    bench.advance()
    bench.instances = assigned
    assert bench.advance(60_000) == []
    assert bench.mine.state is RunnerState.FAILED


def test_a_failed_process_that_ends_after_its_runner_was_assigned_again_counts() -> None:
    bench = Bench()
    bench.advance()
    bench.say(PhaseFailed("connect", "broke"))
    assigned, bench.instances = bench.instances, []
    bench.advance()
    bench.instances = assigned
    bench.advance()
    bench.now_ms += 2_000
    assert bench.exit() == []
    assert bench.mine.state is RunnerState.FAILED
    assert [type(effect) for effect in bench.advance(1_000)] == [StartRunner]
    assert bench.mine.retries_left == 2


def test_what_a_runner_says_while_it_is_stopped_is_no_failure() -> None:
    """Its neighbour may have been stopped before it, and then its link broke."""
    for still_assigned in (False, True):
        bench = Bench(2)
        bench.advance()
        if still_assigned:
            bench.report(RunnerState.FAILED, 1)
        else:
            bench.instances = []
        assert bench.advance() == [StopRunner(MINE, 1, 3_000)]
        assert bench.say(PhaseFailed("running", "the link broke")) == []
        [report] = bench.runners.reports()
        assert (report.state, report.retries_left, report.reason) == (RunnerState.SHUTTING_DOWN, 3, "")
        bench.exit()
        assert [each.state for each in bench.runners.reports()] == ([RunnerState.IDLE] if still_assigned else [])


def test_failures_back_off_and_end_after_the_budget() -> None:
    bench = Bench()
    bench.advance()
    for attempt, pause_ms in ((1, 1_000), (2, 4_000), (3, 16_000)):
        bench.exit(attempt)
        assert bench.runners.reports()[0].retries_left == 4 - attempt
        assert bench.mine.reason == "the runner ended: exit status 1\nout of memory"
        assert bench.advance(pause_ms - 1) == []
        [start] = bench.advance(1)
        assert isinstance(start, StartRunner)
        assert start.attempt == attempt + 1
    bench.exit(4)
    assert bench.runners.reports()[0].retries_left == 0
    assert bench.advance(10**9) == []
    assert bench.mine.state is RunnerState.FAILED


def at_the_end_of_its_budget() -> Bench:
    """It serves, in its last attempt."""
    bench = Bench()
    bench.advance()
    for attempt in (1, 2, 3):
        bench.exit(attempt)
        bench.advance(16_000)
    bench.until_ready(4)
    return bench


def test_a_minute_of_health_gives_the_budget_back() -> None:
    bench = at_the_end_of_its_budget()
    bench.now_ms += 60_000
    bench.exit(4)
    assert (bench.mine.state, bench.mine.retries_left) == (RunnerState.IDLE, 3)  # it is started at once
    for attempt, pause_ms in ((5, 1_000), (6, 4_000), (7, 16_000)):
        assert bench.mine.attempt == attempt
        bench.exit(attempt)
        assert bench.advance(pause_ms - 1) == []
        assert bench.advance(1)
    bench.exit(8)
    assert bench.mine.retry_ms is None


def test_a_link_that_breaks_after_a_while_is_made_again_at_once() -> None:
    bench = Bench(2)
    linked(bench)
    bench.now_ms += 60_000
    [regroup] = bench.say(Parted("The link to stage 1 is lost."))
    assert isinstance(regroup, RegroupRunner)
    assert bench.mine.attempt == 2


@pytest.mark.parametrize(("steps", "retries_left"), [((1, 2, 2, 2), 3), ((1, 1, 1, 1), 1)])
def test_seconds_of_work_give_the_budget_back(steps: tuple[int, ...], retries_left: int) -> None:
    """What is killed from outside every 20 s is started every 20 s; what dies of each request is not."""
    bench = at_the_end_of_its_budget()
    for count in steps:
        bench.say(Beat(count, is_busy=True), attempt=4)
        assert bench.advance(2_000) == []
    bench.exit(4)
    assert bench.mine.retries_left == retries_left


def test_what_has_come_to_serve_is_not_given_up() -> None:
    """What it was asked may have killed it. Whoever asks so gives up first, and others' answers go on then."""
    bench = at_the_end_of_its_budget()
    for attempt in range(4, 8):
        bench.exit(attempt)
        assert bench.advance(16_000 - 1) == []
        assert bench.advance(1)
        bench.until_ready(attempt + 1)
    bench.exit(8)
    bench.advance(16_000)
    bench.exit(9)  # before it serves
    assert (bench.mine.state, bench.mine.retry_ms) == (RunnerState.FAILED, None)


def test_the_time_that_a_runner_hung_is_no_health() -> None:
    bench = at_the_end_of_its_budget()
    for _ in range(31 * 5):  # longer than a step may take
        bench.say(Beat(1, is_busy=True), attempt=4)
        bench.advance(2_000)
    assert bench.mine.state is RunnerState.FAILED
    bench.exit(4)
    assert bench.mine.retry_ms == bench.now_ms + 16_000


@pytest.mark.parametrize(("last", "pause_ms"), [(1, 1_000), (2, 0)])
def test_nor_is_it_where_a_new_generation_came_meanwhile(last: int, pause_ms: int) -> None:
    bench = Bench(2)
    linked(bench)
    for count in range(1, 11):
        bench.say(Beat(min(count, last), is_busy=True))
        bench.advance(BEAT_MS)
    bench.report(RunnerState.IDLE, 2)
    [regroup] = bench.advance()
    assert isinstance(regroup, RegroupRunner)
    [stop] = bench.advance(5_000)  # it says nothing any more
    assert isinstance(stop, StopRunner)
    bench.exit()
    assert bench.mine.has_process is (pause_ms == 0)  # what was well is started again at once
    bench.advance(pause_ms)
    assert bench.mine.has_process


@pytest.mark.parametrize(("beats", "pause_ms"), [(0, 1_000), (1, 0)])
def test_nor_is_the_time_between_requests(beats: int, pause_ms: int) -> None:
    """The simulator's seed 34350: it hung on the request after the pause."""
    bench = Bench()
    bench.advance()
    bench.until_ready()
    for count in [*range(1, beats + 1), *[beats] * 10]:
        bench.say(Beat(count, is_busy=count < beats))
        assert bench.advance(BEAT_MS) == []
    bench.say(Beat(beats + 1, is_busy=True))
    ended = []
    for _ in range(5 * 30):  # as long as a step may take
        bench.say(Beat(beats + 1, is_busy=True))
        ended = bench.advance(BEAT_MS)
    assert isinstance(ended[0], StopRunner)
    bench.exit()
    assert bench.mine.has_process is (pause_ms == 0)
    bench.advance(pause_ms)
    assert bench.mine.has_process


@pytest.mark.parametrize(("beats", "pause_ms"), [(1, 1_000), (2, 0)])
def test_nor_is_the_time_that_its_machine_slept(beats: int, pause_ms: int) -> None:
    """The simulator's seed 26059: it said nothing any more when its machine had woken."""
    bench = Bench()
    bench.advance()
    bench.until_ready()
    for count in range(1, beats + 1):
        bench.say(Beat(count, is_busy=True))
        bench.advance(BEAT_MS)
    bench.now_ms += 3_600_000
    bench.runners.wake(bench.now_ms, 3_600_000)
    assert bench.advance(10_000 - 1) == []  # its time to give a sign of life has begun anew
    [stop] = bench.advance(1)
    assert isinstance(stop, StopRunner)
    bench.exit()
    assert bench.mine.has_process is (pause_ms == 0)  # what was well before is started again at once
    bench.advance(pause_ms)
    assert bench.mine.has_process


def test_what_a_process_has_done_is_no_merit_of_a_runner_that_gave_it_away() -> None:
    """The simulator's seed 32120: the wish was assigned elsewhere and back, and the process had ended meanwhile."""
    bench = Bench()
    bench.advance()
    bench.until_ready()
    for count in range(1, 13):
        bench.say(Beat(count, is_busy=True))
        bench.advance(1_000)
    bench.instances = [second()]
    [regroup] = bench.advance()
    assert isinstance(regroup, RegroupRunner)
    bench.exit()
    bench.instances = [instance(1)]
    [start] = bench.advance(3_000)
    assert isinstance(start, StartRunner)
    bench.now_ms += 1_000
    assert bench.exit(start.attempt) == []
    [start] = bench.advance(1_000)
    assert isinstance(start, StartRunner)


def test_nor_is_it_where_a_link_breaks_after_waking() -> None:
    bench = Bench(2)
    linked(bench)
    bench.now_ms += 3_600_000
    bench.runners.wake(bench.now_ms, 3_600_000)
    assert bench.say(Parted("The link to stage 1 is lost.")) == []
    [regroup] = bench.advance(1_000)
    assert isinstance(regroup, RegroupRunner)


def test_a_failed_phase_stops_the_process_and_waits_until_it_is_reaped() -> None:
    bench = Bench()
    bench.advance()
    assert bench.say(PhaseFailed("load", "the file is cut short")) == [StopRunner(MINE, 1, 3_000)]
    assert bench.advance(100_000) == []
    bench.exit()
    assert bench.mine.reason == "load: the file is cut short"  # it has said why: its log has no more to tell
    [start] = bench.advance(1_000)
    assert isinstance(start, StartRunner)


def test_a_runner_that_speaks_out_of_turn_has_failed() -> None:
    bench = Bench()
    bench.advance()
    assert bench.say(Ready()) == [StopRunner(MINE, 1, 3_000)]
    assert bench.mine.reason == "protocol: the runner said Ready while Idle"


def test_a_former_attempt_is_not_heard() -> None:
    bench = Bench()
    bench.advance()
    bench.exit()
    bench.advance(1_000)
    assert bench.exit(1) == []
    assert bench.say(Listening(7), attempt=1) == []
    assert bench.mine.state is RunnerState.IDLE


def test_what_does_not_fit_waits_and_spends_no_budget() -> None:
    """The node knows its memory better than the leader that placed it there. While it loads it takes a tenth more."""
    bench = Bench()
    bench.instances = [instance(1, 3_100_000_000)]
    bench.free_bytes = None
    assert bench.advance() == []
    assert bench.runners.reports()[0].waiting == ""  # nobody knows yet
    for free_bytes in (2_100_000_000, 2_700_000_000):
        bench.free_bytes = free_bytes
        assert bench.advance(10**9) == []
    [report] = bench.runners.reports()
    assert (report.state, report.retries_left) == (RunnerState.IDLE, 3)
    assert report.waiting == "has too little memory now: 2.7 GB free, 3.4 GB needed"
    bench.free_bytes = 3_410_000_000
    [start] = bench.advance()
    assert isinstance(start, StartRunner)
    assert bench.runners.reports()[0].waiting == ""


def test_nothing_is_said_of_memory_on_figures_from_before_a_runner_started_loaded_or_ended() -> None:
    bench = Bench()
    bench.free_bytes, bench.is_memory_fresh = 99, False
    assert bench.advance() == []
    assert bench.mine.waiting == ""
    bench.is_memory_fresh = True
    bench.advance()
    assert bench.mine.waiting != ""


def test_a_runner_waits_without_a_word_while_another_takes_memory() -> None:
    """What that one will take is promised in full, and what it took already is missing from what is free."""
    bench = Bench()
    bench.free_bytes = 230
    bench.advance()
    bench.say(Listening(7))
    bench.say(Connected())
    bench.instances.append(second())
    bench.free_bytes = 160
    assert bench.advance() == []
    assert bench.runners.is_memory_moving
    assert bench.runners.reports()[1].waiting == ""
    bench.is_memory_fresh, bench.free_bytes = False, 60
    bench.say(Loaded(100))
    assert bench.runners.reports()[1].waiting == ""
    bench.is_memory_fresh, bench.free_bytes = True, 140
    [start] = bench.advance()
    assert isinstance(start, StartRunner)


@pytest.mark.parametrize("fails", [True, False])
def test_a_runner_waits_without_a_word_while_another_gives_memory_back(fails: bool) -> None:  # noqa: FBT001
    bench = Bench()
    bench.advance()
    if fails:
        bench.say(PhaseFailed("load", "the file is cut short"))
        bench.instances.append(second())
    else:
        bench.instances = [second()]
    bench.free_bytes = 99
    bench.advance()
    assert bench.runners.is_memory_moving
    assert bench.runners.reports()[1].waiting == ""
    bench.exit()
    assert bench.runners.runners[RunnerId("j.0")].waiting != ""


def test_memory_is_promised_to_runners_that_start_and_to_the_caches_of_those_that_have_loaded() -> None:
    bench = Bench()
    bench.advance()
    bench.instances.append(second())
    bench.free_bytes = 199  # the first takes 100 of it
    assert bench.advance() == []
    assert bench.runners.reports()[1].waiting == (
        "has too little memory now: 0 MB free, 0 MB of that promised to others, 0 MB needed"
    )
    bench.free_bytes = 149  # the first holds 60 and takes 40 more
    for message in (Listening(7), Connected(), Loaded(60)):
        bench.say(message)
    assert bench.runners.reports()[1].waiting != ""
    bench.free_bytes = 150
    [start] = bench.advance()
    assert isinstance(start, StartRunner)


def test_what_a_cache_has_filled_of_its_promise_is_not_counted_twice() -> None:
    """Free memory falls as it fills; else a runner that is started anew would wait for ever for what is there."""
    bench = Bench()
    bench.advance()
    bench.hear(RunnerStarted(MINE, 1, 4711))
    bench.runners.measure({4711: 30})
    assert bench.mine.resident_bytes == 0  # it loads, and is promised all of its memory until it has
    bench.until_ready()
    bench.instances.append(second())
    bench.free_bytes = 120  # it takes 95 more, as far as anybody knows
    assert bench.advance() == []
    bench.runners.measure({4711: 90, 4712: 7})
    [start] = bench.advance()
    assert isinstance(start, StartRunner)


# ---- two stages ----


def test_a_link_waits_until_the_next_stage_listens_in_the_same_generation() -> None:
    bench = Bench(2)
    bench.advance()
    assert bench.say(Listening(7)) == []
    bench.report(RunnerState.CONNECTING, 1, port=8)
    other = Address("other", 8)
    assert bench.advance() == [TellRunner(MINE, 1, ConnectTo((other,), (other,)))]


def test_while_another_runner_has_failed_for_good_this_one_stops_and_waits() -> None:
    bench = Bench(2)
    bench.advance()
    bench.report(RunnerState.FAILED, 1)
    assert bench.advance() == [StopRunner(MINE, 1, 3_000)]
    bench.exit()
    assert bench.advance(60_000) == []
    assert bench.mine.state is RunnerState.IDLE


def test_while_another_runner_waits_for_memory_this_one_stops_and_gives_its_own_back() -> None:
    """Else two pipelines over the same two nodes could each hold what the other one waits for."""
    bench = Bench(2)
    bench.advance()
    bench.report(RunnerState.IDLE, 2, waiting="has too little memory now")
    assert bench.advance() == [StopRunner(MINE, 1, 3_000)]
    bench.exit()
    assert bench.advance(60_000) == []
    bench.report(RunnerState.IDLE, 2)
    [start] = bench.advance()
    assert isinstance(start, StartRunner)
    assert start.attempt == 2


def test_two_that_wait_for_memory_do_not_wait_for_each_other() -> None:
    bench = Bench(2)
    bench.free_bytes = 99
    bench.report(RunnerState.IDLE, 1, waiting="has too little memory now")
    bench.advance()
    assert (bench.mine.attempt, bench.mine.waiting != "") == (2, True)
    bench.free_bytes = 110
    assert bench.advance() == []
    assert bench.mine.waiting == ""
    bench.report(RunnerState.IDLE, 1)
    [start] = bench.advance()
    assert isinstance(start, StartRunner)
    assert start.attempt == 2


def test_a_stopped_runner_follows_into_the_next_generation() -> None:
    bench = Bench(2)
    bench.advance()
    bench.report(RunnerState.FAILED, 1)
    bench.advance()
    bench.exit()
    bench.report(RunnerState.IDLE, 5)
    [start] = bench.advance(1_000)
    assert isinstance(start, StartRunner)
    assert start.attempt == 5


def test_a_process_follows_into_a_higher_generation_as_soon_as_it_listens() -> None:
    bench = Bench(2)
    bench.advance()
    bench.report(RunnerState.IDLE, 2)
    assert bench.advance() == []
    [regroup] = bench.say(Listening(7))
    assert isinstance(regroup, RegroupRunner)
    assert (regroup.runner_id, regroup.attempt, regroup.spec.generation) == (MINE, 1, 2)
    assert (bench.mine.state, bench.mine.attempt, bench.mine.data_address) == (RunnerState.IDLE, 2, None)


def test_a_failed_runner_opens_a_generation_above_its_own_or_joins_a_higher_one() -> None:
    bench = Bench(2)
    bench.advance()
    bench.exit()
    bench.report(RunnerState.IDLE, 4)
    [start] = bench.advance(1_000)
    assert isinstance(start, StartRunner)
    assert start.attempt == 4


@pytest.mark.parametrize(("free_bytes", "attempt"), [(1_000, 1), (10, 2)])
def test_a_generation_that_nobody_can_have_counted_to_is_not_followed(free_bytes: int, attempt: int) -> None:
    """One more does not fit into a report's field, so that this node could say nothing any more."""
    bench = Bench(2)
    bench.free_bytes = free_bytes
    bench.report(RunnerState.IDLE, 2**64 - 1)
    bench.advance()
    assert bench.mine.attempt == attempt


def test_a_restart_of_the_next_stages_node_opens_a_generation() -> None:
    """Its new process listens again in this generation, perhaps on the same port; our link goes to the old one."""
    bench = Bench(2)
    bench.advance()
    bench.say(Listening(7))
    bench.report(RunnerState.CONNECTING, 1, port=8)
    bench.advance()
    bench.report(RunnerState.CONNECTING, 1, boot=2, port=8)
    [regroup] = bench.advance()
    assert isinstance(regroup, RegroupRunner)
    assert regroup.spec.generation == 2


# ---- what outlives a generation ----


def linked(bench: Bench) -> None:
    """Both runners are ready."""
    bench.advance()
    bench.report(RunnerState.CONNECTING, 1, port=8)
    bench.until_ready()
    bench.report(RunnerState.READY, 1, port=8)


def test_a_runner_that_loses_its_neighbour_keeps_what_it_has_loaded() -> None:
    bench = Bench(2)
    linked(bench)
    assert bench.say(Parted("The link to stage 1 is lost.")) == []
    assert bench.mine.state is RunnerState.PARTED
    bench.report(RunnerState.FAILED, 1, retries_left=3)
    assert bench.advance(60_000) == []  # that one will open the next generation
    bench.report(RunnerState.IDLE, 2, retries_left=2)
    [regroup] = bench.advance()
    assert isinstance(regroup, RegroupRunner)
    assert (regroup.attempt, regroup.spec.generation) == (1, 2)
    assert bench.mine.resident_bytes > 0


def test_what_was_said_before_a_new_generation_is_no_news() -> None:
    bench = Bench(2)
    linked(bench)
    bench.report(RunnerState.IDLE, 2)
    bench.advance()
    for late in (Activity(1, 0), Beat(7, is_busy=True), Parted("lost")):
        assert bench.say(late) == []
    assert (bench.mine.state, bench.mine.requests_running) == (RunnerState.IDLE, 0)
    bench.say(Listening(7))
    assert bench.mine.state is RunnerState.CONNECTING


def test_where_only_the_link_was_lost_a_parted_runner_opens_the_next_generation_itself() -> None:
    bench = Bench(2)
    linked(bench)
    bench.say(Parted("The link to stage 1 is lost."))
    assert bench.advance(999) == []
    [regroup] = bench.advance(1)
    assert isinstance(regroup, RegroupRunner)
    assert regroup.spec.generation == 2
    assert bench.mine.retries_left == 3  # nothing of it has failed


def test_a_link_that_is_lost_again_and_again_is_made_again_at_longer_intervals() -> None:
    bench = Bench(2)
    linked(bench)
    for generation, back_off_ms in enumerate((1_000, 4_000, 16_000, 16_000, 16_000), start=2):
        bench.say(Parted("The link to stage 1 is lost."))
        assert bench.advance(back_off_ms - 1) == []
        [regroup] = bench.advance(1)
        assert isinstance(regroup, RegroupRunner)
        bench.report(RunnerState.CONNECTING, generation, port=8)
        bench.until_ready()
        bench.report(RunnerState.READY, generation, port=8)


def test_a_parted_process_that_dies_without_a_budget_stays_failed() -> None:
    bench = Bench(2)
    linked(bench)
    bench.say(Parted("The link to stage 1 is lost."))
    bench.mine.retries_left = 0
    bench.exit()
    assert bench.advance(60_000) == []
    assert (bench.mine.state, bench.mine.retries_left) == (RunnerState.FAILED, 0)


def test_a_regrouped_process_may_end_its_step_first_while_it_beats() -> None:
    bench = Bench(2)
    linked(bench)
    bench.report(RunnerState.IDLE, 2)
    [regroup] = bench.advance()
    assert isinstance(regroup, RegroupRunner)
    for _ in range(60):
        assert bench.advance(2_000) == []
        assert bench.say(Beat(7, is_busy=True)) == []
    assert bench.advance(4_999) == []
    [stop] = bench.advance(1)
    assert isinstance(stop, StopRunner)
    assert bench.mine.reason == "it gave no sign of life for 5 s when it was to begin anew"


def test_but_not_longer_than_a_step_may_take() -> None:
    """What hangs beats on. Its neighbours may have begun anew just before its time was over."""
    bench = Bench(2)
    linked(bench)
    bench.say(Activity(1, 0))
    for _ in range(140):
        bench.say(Beat(7, is_busy=True))
        assert bench.advance(BEAT_MS) == []
    bench.report(RunnerState.IDLE, 2)
    [regroup] = bench.advance()
    assert isinstance(regroup, RegroupRunner)
    told = []
    for _ in range(16):  # 30 s to listen, since the regrouping
        bench.say(Beat(7, is_busy=True))
        told += bench.advance(BEAT_MS)
    [stop] = told
    assert isinstance(stop, StopRunner)
    assert bench.mine.reason == (
        "the step that it was to leave did not end within 300 s (COVEY_STEP_TIMEOUT_S allows more)"
    )


def moved(stages: int, layers: tuple[int, int], memory_bytes: int = 100) -> Instance:
    """The same wish, assigned anew: this node has other layers."""
    start, end = layers
    stage = Stage(RunnerId("k.0"), ME, Shard(start, end, 6), memory_bytes)
    rest = [Stage(RunnerId("k.1"), OTHER, Shard(end, 6, 6), 100)][: stages - 1]
    return replace(instance(stages), instance_id=InstanceId("k"), stages=(stage, *rest))


def test_another_assignment_of_the_same_model_takes_the_process_over() -> None:
    bench = Bench(2)
    linked(bench)
    bench.instances, bench.other = [moved(1, (0, 6), 150)], None
    [regroup] = bench.advance()
    assert isinstance(regroup, RegroupRunner)
    assert (regroup.runner_id, regroup.attempt) == (MINE, 1)  # what the process was started as
    assert (regroup.spec.runner_id, regroup.spec.shard, regroup.spec.generation) == ("k.0", Shard(0, 6, 6), 1)
    assert list(bench.runners.runners) == ["k.0"]
    heir = bench.runners.runners[RunnerId("k.0")]
    assert (heir.attempt, heir.resident_bytes, heir.retries_left) == (1, 5, 3)


def test_a_process_for_whose_new_layers_there_is_no_room_ends_and_waits_for_it() -> None:
    bench = Bench(2)
    linked(bench)
    bench.instances, bench.other, bench.free_bytes = [moved(1, (0, 6), 150)], None, 144  # it holds 5: 145 are needed
    assert bench.advance() == [StopRunner(MINE, 1, 3_000)]
    bench.runners.hear(bench.now_ms, RunnerExited(MINE, 1, "exit status 0", ""))
    bench.runners.measure({})
    assert bench.advance(1_000) == []
    assert "too little memory" in bench.runners.runners[RunnerId("k.0")].waiting


def test_a_process_of_another_model_or_of_other_layers_is_not_taken_over() -> None:
    for other in (
        replace(moved(1, (0, 6)), context_length=256),
        replace(moved(1, (0, 6)), card=replace(instance(1).card, model_id=ModelId("other"))),
        moved(1, (3, 6)),
    ):
        bench = Bench(2)
        linked(bench)
        bench.paths = {**bench.paths, ModelId("other"): "/other.gguf"}
        bench.instances, bench.other = [other], None
        effects = bench.advance()
        assert StopRunner(MINE, 1, 3_000) in effects
        assert [each.runner_id for each in effects if isinstance(each, StartRunner)] == ["k.0"]


# ---- the table ----


def test_a_pair_that_is_missing_tells_its_story() -> None:
    runner = Runner(instance(1), instance(1).stages[0], 3_000)
    with pytest.raises(UnexpectedInputError, match=r"runner i\.0 \(attempt 0\) got Retry\(attempt=3\) in state Idle"):
        step(runner, Retry(3))


def test_every_state_can_be_stopped_and_every_process_can_end() -> None:
    for state in RunnerState:
        if state is not RunnerState.SHUTDOWN:
            assert (state, Stop) in TABLE
            assert (state, RunnerExited) in TABLE
    assert (RunnerState.IDLE, Begin) in TABLE


def test_the_page_shows_the_table() -> None:
    text = PAGE_TEXT.format(diagram=diagram())
    if os.environ.get("COVEY_UPDATE_GOLDEN"):
        PAGE.write_text(text)
    assert PAGE.read_text() == text
