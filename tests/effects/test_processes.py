"""Runner processes as they are in life: some talk, some crash, some hang, some write rubbish. All are reaped."""

import os
import signal
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import psutil
import pytest

from covey.effects import processes as runner_processes
from covey.effects.processes import Processes
from covey.schema.ids import RunnerId
from covey.schema.machine import (
    Input,
    RunnerExited,
    RunnerHalted,
    RunnerSaid,
    RunnerStarted,
    StartRunner,
    StopRunner,
    TellRunner,
)
from covey.schema.model import Shard
from covey.schema.runner import Listening, Ready, RunnerSpec, WarmUp
from tests.credentials import credentials, node

pytestmark = pytest.mark.anyio

# What every child of these tests can do: read one command, say something.
PROLOGUE = """
import os, signal, sys, time
import msgspec
from covey.schema import wire
from covey.schema.runner import *
decoder = msgspec.msgpack.Decoder(RunnerCommand)
def hear():
    prefix = sys.stdin.buffer.read(4)
    return decoder.decode(sys.stdin.buffer.read(wire.body_length(prefix))) if prefix else None
def say(message):
    sys.stdout.buffer.write(wire.pack(message))
    sys.stdout.buffer.flush()
"""


def spec(runner_id: str = "r1") -> RunnerSpec:
    return RunnerSpec(
        runner_id=RunnerId(runner_id),
        instance_id="i1",
        engine="fake",
        model_path="/nowhere",
        shard=Shard(0, 1, 1),
        stage_index=0,
        stage_count=1,
        stage_node_ids=(node(0).node_id,),
        context_length=16,
        slot_count=1,
        thread_count=3,
        listen_host="127.0.0.1",
        connect_ms=20_000,
    )


class Stage:
    """What the driver would be: remembers what came."""

    def __init__(self) -> None:
        self.inputs: list[Input] = []
        self._changed = anyio.Event()

    async def deliver(self, item: Input) -> None:
        self.inputs.append(item)
        self._changed.set()
        self._changed = anyio.Event()

    async def wait_for(self, wanted: Callable[[Input], bool]) -> Input:
        with anyio.fail_after(20):
            while True:
                for item in self.inputs:
                    if wanted(item):
                        return item
                await self._changed.wait()

    async def wait_exit(self) -> RunnerExited:
        item = await self.wait_for(lambda item: isinstance(item, RunnerExited))
        assert isinstance(item, RunnerExited)
        return item


@asynccontextmanager
async def running(stage: Stage, folder: Path, code: str) -> AsyncGenerator[Processes]:
    async with anyio.create_task_group() as tasks:
        processes = Processes(tasks, stage.deliver, folder, credentials(), [sys.executable, "-c", PROLOGUE + code])
        processes.start(StartRunner(RunnerId("r1"), 1, spec()))
        yield processes
        tasks.cancel_scope.cancel()


async def test_a_runner_is_configured_answers_and_ends(tmp_path: Path) -> None:
    code = """
spec = hear().spec
say(Listening(len(spec.runner_id)))
print("threads", os.environ["OMP_NUM_THREADS"], file=sys.stderr)
while not isinstance(hear(), WarmUp): pass
say(Ready())
assert isinstance(hear(), ShutDown)
"""
    stage = Stage()
    async with running(stage, tmp_path, code) as processes:
        await stage.wait_for(lambda item: item == RunnerSaid(RunnerId("r1"), 1, Listening(2)))
        processes.tell(TellRunner(RunnerId("r1"), 1, WarmUp()))
        await stage.wait_for(lambda item: item == RunnerSaid(RunnerId("r1"), 1, Ready()))
        processes.stop(StopRunner(RunnerId("r1"), 1, grace_ms=10_000))
        ended = await stage.wait_exit()
    assert ended == RunnerExited(RunnerId("r1"), 1, "exit status 0", "threads 3")
    assert isinstance(stage.inputs[0], RunnerStarted)
    assert not psutil.pid_exists(stage.inputs[0].process_id)
    assert (tmp_path / "logs" / "runner-r1.log").read_bytes() == b"threads 3\n"


async def test_a_crash_is_told_once_with_its_last_words(tmp_path: Path) -> None:
    stage = Stage()
    async with running(
        stage, tmp_path, "for n in range(100): print(n, file=sys.stderr)\nraise SystemExit(3)"
    ) as processes:
        ended = await stage.wait_exit()
        processes.stop(StopRunner(RunnerId("r1"), 1, 0))  # too late is no error
        processes.tell(TellRunner(RunnerId("r1"), 1, WarmUp()))
        await anyio.sleep(0.05)
    assert ended.description == "exit status 3"
    assert ended.log_tail.splitlines() == [str(number) for number in range(60, 100)]
    assert [type(item) for item in stage.inputs] == [RunnerStarted, RunnerExited]


async def test_a_killed_runner_is_described(tmp_path: Path) -> None:
    """The system ran out of memory and chose a runner."""
    stage = Stage()
    async with running(stage, tmp_path, "time.sleep(60)"):
        started = await stage.wait_for(lambda item: isinstance(item, RunnerStarted))
        os.kill(started.process_id, signal.SIGKILL)
        assert (await stage.wait_exit()).description == "signal 9 (killed)"


@pytest.mark.parametrize(
    ("code", "description"),
    [
        ("time.sleep(60)", "signal 15 (terminated)"),
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN); hear(); say(Ready()); time.sleep(60)", "signal 9 (killed)"),
    ],
)
async def test_a_hanging_runner_is_ended(tmp_path: Path, code: str, description: str) -> None:
    stage = Stage()
    async with running(stage, tmp_path, code) as processes:
        kind = RunnerSaid if "say" in code else RunnerStarted
        await stage.wait_for(lambda item: isinstance(item, kind))
        processes.stop(StopRunner(RunnerId("r1"), 1, grace_ms=100))
        assert (await stage.wait_exit()).description == description


async def test_a_process_that_is_stopped_for_good_is_killed_without_being_asked(tmp_path: Path) -> None:
    """It can't hear SIGTERM either; nothing but SIGKILL reaches it."""
    stage = Stage()
    code = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); say(Ready()); time.sleep(60)"
    async with running(stage, tmp_path, code) as processes:
        started = await stage.wait_for(lambda item: isinstance(item, RunnerStarted))
        await stage.wait_for(lambda item: isinstance(item, RunnerSaid))
        os.kill(started.process_id, signal.SIGSTOP)
        before = anyio.current_time()
        processes.stop(StopRunner(RunnerId("r1"), 1, grace_ms=300, asks_first=False))
        assert (await stage.wait_exit()).description == "signal 9 (killed)"
        assert anyio.current_time() - before < 2  # once the grace, not twice


async def test_how_long_a_signal_holds_a_process_is_told_until_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_processes, "HALTED_LOOK_MS", 50)
    stage = Stage()
    async with running(stage, tmp_path, "say(Ready()); time.sleep(60)"):
        started = await stage.wait_for(lambda item: isinstance(item, RunnerStarted))
        await stage.wait_for(lambda item: isinstance(item, RunnerSaid))
        for _ in range(2):  # it begins anew each time
            stage.inputs.clear()
            os.kill(started.process_id, signal.SIGSTOP)
            await stage.wait_for(lambda item: item == RunnerHalted(RunnerId("r1"), 1, 150))
            os.kill(started.process_id, signal.SIGCONT)
            await anyio.sleep(0.3)
            told = len(stage.inputs)
            await anyio.sleep(0.3)
            assert len(stage.inputs) == told


async def test_what_waits_computes_or_is_slowed_down_by_stops_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs that limit what others compute stop them and let them go on many times a second."""
    monkeypatch.setattr(runner_processes, "HALTED_LOOK_MS", 100)
    stage = Stage()
    async with running(stage, tmp_path, "say(Ready()); sys.stdout.flush()\nwhile True: pass"):
        started = await stage.wait_for(lambda item: isinstance(item, RunnerStarted))
        await stage.wait_for(lambda item: isinstance(item, RunnerSaid))
        for _ in range(20):
            os.kill(started.process_id, signal.SIGCONT)
            await anyio.sleep(0.04)
            os.kill(started.process_id, signal.SIGSTOP)
            await anyio.sleep(0.04)
        assert not [item for item in stage.inputs if isinstance(item, RunnerHalted)]


async def test_a_process_that_hangs_may_still_say_goodbye(tmp_path: Path) -> None:
    stage = Stage()
    code = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); say(Ready()); time.sleep(60)"
    async with running(stage, tmp_path, code) as processes:
        await stage.wait_for(lambda item: isinstance(item, RunnerSaid))
        before = anyio.current_time()
        processes.stop(StopRunner(RunnerId("r1"), 1, grace_ms=10_000, asks_first=False))
        assert (await stage.wait_exit()).description == "exit status 7"
        assert anyio.current_time() - before < 5


async def test_who_lives_is_known_and_who_ended_is_told(tmp_path: Path) -> None:
    stage = Stage()
    async with running(stage, tmp_path, "hear(); hear()") as processes:
        started = await stage.wait_for(lambda item: isinstance(item, RunnerStarted))
        await anyio.sleep(0.05)
        assert processes.process_ids() == (started.process_id,)
        ended = processes.next_end()
        processes.stop(StopRunner(RunnerId("r1"), 1, grace_ms=5_000))
        with anyio.fail_after(10):
            await ended.wait()
        assert isinstance(stage.inputs[-1], RunnerExited)
        assert processes.process_ids() == ()
        assert not processes.next_end().is_set()


async def test_a_node_ends_although_a_killed_process_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver holds it: whoever waited for it would hang as well."""
    monkeypatch.setattr(runner_processes, "REAP_MS", 200)
    stage = Stage()
    with anyio.fail_after(10):
        with monkeypatch.context() as broken:
            broken.setattr(runner_processes, "_signal", lambda *_: None)
            async with running(stage, tmp_path, "time.sleep(60)"):
                started = await stage.wait_for(lambda item: isinstance(item, RunnerStarted))
        os.kill(started.process_id, signal.SIGKILL)
        await anyio.sleep(0.5)  # the event loop closes what belonged to it


async def test_a_stop_that_overtakes_the_start_still_stops(tmp_path: Path) -> None:
    stage = Stage()
    async with running(stage, tmp_path, "time.sleep(60)") as processes:
        processes.stop(StopRunner(RunnerId("r1"), 1, grace_ms=100))
        await stage.wait_exit()
    assert [type(item) for item in stage.inputs] == [RunnerStarted, RunnerExited]


@pytest.mark.parametrize("rubbish", ["b'x' * 100", "b'\\x02\\x00\\x00\\x00ab'", "b'\\xff\\xff\\xff\\xff'"])
async def test_rubbish_on_standard_output_ends_the_runner(tmp_path: Path, rubbish: str) -> None:
    """A library prints to standard output, where only messages belong."""
    stage = Stage()
    code = f"sys.stdout.buffer.write({rubbish}); sys.stdout.buffer.flush(); time.sleep(60)"
    async with running(stage, tmp_path, code):
        ended = await stage.wait_exit()
    assert ended.description.startswith("it wrote something to its standard output that is no message")


async def test_a_command_that_can_not_start(tmp_path: Path) -> None:
    stage = Stage()
    async with anyio.create_task_group() as tasks:
        processes = Processes(tasks, stage.deliver, tmp_path, credentials(), [str(tmp_path / "missing")])
        processes.start(StartRunner(RunnerId("r1"), 1, spec()))
        ended = await stage.wait_exit()
    assert ended.description == "could not be started: No such file or directory"
    assert stage.inputs == [ended]


async def test_starting_twice_starts_once(tmp_path: Path) -> None:
    stage = Stage()
    async with running(stage, tmp_path, "hear()") as processes:
        processes.start(StartRunner(RunnerId("r1"), 1, spec()))
        await stage.wait_exit()
    assert [type(item) for item in stage.inputs] == [RunnerStarted, RunnerExited]


async def test_attempts_do_not_mix(tmp_path: Path) -> None:
    stage = Stage()
    async with running(stage, tmp_path, "hear(); hear()") as processes:
        processes.start(StartRunner(RunnerId("r1"), 2, spec()))
        await stage.wait_for(lambda item: isinstance(item, RunnerStarted) and item.attempt == 2)
        processes.stop(StopRunner(RunnerId("r1"), 1, grace_ms=5000))
        assert (await stage.wait_exit()).attempt == 1
        processes.stop(StopRunner(RunnerId("r1"), 2, grace_ms=5000))
        await stage.wait_for(lambda item: isinstance(item, RunnerExited) and item.attempt == 2)


async def test_a_runner_that_never_reads_is_given_up(tmp_path: Path) -> None:
    stage = Stage()
    async with running(stage, tmp_path, "time.sleep(60)") as processes:
        await stage.wait_for(lambda item: isinstance(item, RunnerStarted))
        for _ in range(100_000):
            processes.tell(TellRunner(RunnerId("r1"), 1, WarmUp()))
        ended = await stage.wait_exit()
    assert ended.description == "it did not read its commands (signal 9 (killed))"


async def test_nothing_outlives_a_node_that_is_cancelled(tmp_path: Path) -> None:
    stage = Stage()
    async with running(stage, tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"):
        started = await stage.wait_for(lambda item: isinstance(item, RunnerStarted))
    assert not psutil.pid_exists(started.process_id)


async def test_a_grandchild_that_holds_the_pipes_delays_the_end_by_little(tmp_path: Path) -> None:
    stage = Stage()
    code = "import subprocess; child = subprocess.Popen(['sleep', '60']); say(Listening(child.pid))"
    async with running(stage, tmp_path, code):
        with anyio.fail_after(10):
            ended = await stage.wait_exit()
    assert ended.description == "exit status 0"
    said = next(item for item in stage.inputs if isinstance(item, RunnerSaid))
    os.kill(said.message.port, signal.SIGKILL)


async def test_the_log_is_bounded(tmp_path: Path) -> None:
    stage = Stage()
    for number in range(30):
        (tmp_path / "logs").mkdir(exist_ok=True)
        (tmp_path / "logs" / f"runner-old{number}.log").write_text("")
    async with running(stage, tmp_path, "sys.stderr.write('y' * 3_000_000)"):
        ended = await stage.wait_exit()
    assert len(ended.log_tail) == 500
    assert (tmp_path / "logs" / "runner-r1.log").stat().st_size == 1024 * 1024
    assert len(list((tmp_path / "logs").iterdir())) == 20
