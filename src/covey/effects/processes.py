"""Runner processes: started by command line, spoken to in frames over their pipes, and always reaped.

A runner is in a session of its own, so that Ctrl-C in a terminal reaches only the node, which ends it in order.
Should the node die, the end of its standard input tells the runner to end as well; nothing here must survive for it.
"""

import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import anyio
import msgspec
import psutil
from anyio.abc import ByteReceiveStream, ByteSendStream, Process, TaskGroup

from covey.control.deadlines import REAP_MS
from covey.effects import leftovers
from covey.effects.runner_log import RunnerLog
from covey.schema import wire
from covey.schema.ids import RunnerId
from covey.schema.machine import (
    Input,
    RegroupRunner,
    RunnerExited,
    RunnerHalted,
    RunnerSaid,
    RunnerStarted,
    StartRunner,
    StopRunner,
    TellRunner,
)
from covey.schema.runner import Configure, RunnerCommand, RunnerMessage, RunnerSpec, ShutDown
from covey.schema.trust import Credentials

RUNNER_COMMAND: Final = (sys.executable, "-P", "-m", "covey.engine")  # -P: the folder we stand in hides no module
LOGS: Final = "logs"  # in the node's folder
COMMANDS_MAX: Final = 64  # a generation takes four; more means that the runner has stopped reading
PIPE_DRAIN_MS_MAX: Final = 1000  # after its end: a grandchild may hold the pipes open
HALTED_LOOK_MS: Final = 500  # between two looks at a process, each of which takes some 0.1 ms
THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

_log = logging.getLogger(__name__)

Deliver = Callable[[Input], Awaitable[None]]


class _Runner:
    """One attempt, known from the moment its start is asked for."""

    def __init__(self, effect: StartRunner) -> None:
        self.runner_id, self.attempt, self.spec = effect.runner_id, effect.attempt, effect.spec
        self.commands, self.outgoing = anyio.create_memory_object_stream[RunnerCommand](COMMANDS_MAX)
        self.process_id = 0  # while it has one
        self.stop_wanted = anyio.Event()
        self.grace_ms, self.asks_first = 0, True
        self.fault = ""  # why we ended it unasked, if we did

    def close(self) -> None:
        self.commands.close()
        self.outgoing.close()


class _Pipes:
    """The three that `open_process` makes unless told otherwise."""

    def __init__(self, process: Process) -> None:
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise AssertionError("a runner is always started with pipes")
        self.stdin: ByteSendStream = process.stdin
        self.stdout: ByteReceiveStream = process.stdout
        self.stderr: ByteReceiveStream = process.stderr


class Processes:
    """Carries out `StartRunner`, `RegroupRunner`, `TellRunner` and `StopRunner`; the answers go to `deliver`."""

    def __init__(
        self,
        tasks: TaskGroup,
        deliver: Deliver,
        folder: Path,
        credentials: Credentials,
        command: Sequence[str] = RUNNER_COMMAND,
    ) -> None:
        self._tasks = tasks
        self._deliver = deliver
        self._folder = folder
        self._credentials = credentials
        self._command = command
        self._decoder = msgspec.msgpack.Decoder(RunnerMessage)
        self._runners: dict[tuple[RunnerId, int], _Runner] = {}
        self._ended = anyio.Event()

    def process_ids(self) -> tuple[int, ...]:
        """Of the runners that live now."""
        return tuple(runner.process_id for runner in self._runners.values() if runner.process_id)

    def next_end(self) -> anyio.Event:
        """Set when the next process has ended, and the machine was told."""
        return self._ended

    def start(self, effect: StartRunner) -> None:
        """Answered by `RunnerStarted`, `RunnerSaid`, `RunnerHalted`..., at the end by exactly one `RunnerExited`."""
        key = (effect.runner_id, effect.attempt)
        if key not in self._runners:  # else it is carried out already
            self._runners[key] = _Runner(effect)
            self._tasks.start_soon(self._run, self._runners[key], name=f"runner {effect.runner_id}")

    def tell(self, effect: TellRunner | RegroupRunner) -> None:
        """A runner that is gone is not told: its `RunnerExited` is on the way."""
        runner = self._runners.get((effect.runner_id, effect.attempt))
        if runner is None:
            return
        regroups = isinstance(effect, RegroupRunner)
        command = Configure(effect.spec, self._credentials) if regroups else effect.command
        try:
            runner.commands.send_nowait(command)
        except anyio.WouldBlock:
            _give_up(runner, "it did not read its commands")

    def stop(self, effect: StopRunner) -> None:
        runner = self._runners.get((effect.runner_id, effect.attempt))
        if runner is not None and not runner.stop_wanted.is_set():
            runner.grace_ms, runner.asks_first = effect.grace_ms, effect.asks_first
            runner.stop_wanted.set()

    async def _run(self, runner: _Runner) -> None:
        log = RunnerLog(self._folder / LOGS, runner.runner_id)
        try:
            description = await self._run_process(runner, log)
        finally:
            del self._runners[runner.runner_id, runner.attempt]
            runner.close()
            log.close()
        await self._deliver(RunnerExited(runner.runner_id, runner.attempt, description, log.tail()))
        self._ended.set()
        self._ended = anyio.Event()

    async def _run_process(self, runner: _Runner, log: RunnerLog) -> str:
        try:
            process = await anyio.open_process(self._command, env=_environment(runner.spec), start_new_session=True)
        except OSError as error:
            return f"could not be started: {error.strerror or error}"
        try:
            leftovers.note(self._folder, process.pid)
            await self._deliver(RunnerStarted(runner.runner_id, runner.attempt, process.pid))
            runner.process_id = process.pid
            await self._converse(runner, process, log)
        finally:
            with anyio.move_on_after(REAP_MS / 1000, shield=True):
                await _reap(process)
            if process.returncode is None:
                _log.error(
                    "process %d of a runner does not end, although it was killed: it is left behind", process.pid
                )
            runner.process_id = 0
            if process.returncode is not None:
                leftovers.forget(self._folder, process.pid)
        ended = describe_exit(await process.wait())
        return f"{runner.fault} ({ended})" if runner.fault else ended

    async def _converse(self, runner: _Runner, process: Process, log: RunnerLog) -> None:
        """Until the process has ended and its pipes are read to their end."""
        pipes = _Pipes(process)
        runner.commands.send_nowait(Configure(runner.spec, self._credentials))
        async with anyio.create_task_group() as helpers:
            helpers.start_soon(_write, runner, pipes.stdin)
            helpers.start_soon(_stop_when_asked, runner, process)
            helpers.start_soon(self._watch_halted, runner, process)
            async with anyio.create_task_group() as readers:
                readers.start_soon(self._read, runner, pipes.stdout)
                readers.start_soon(_read_log, pipes.stderr, log)
                await process.wait()
                readers.cancel_scope.deadline = anyio.current_time() + PIPE_DRAIN_MS_MAX / 1000
            helpers.cancel_scope.cancel()

    async def _watch_halted(self, runner: _Runner, process: Process) -> None:
        """Two looks between which it has computed are no halt: programs that limit others stop them time and again."""
        before, seen_ms = None, 0
        while True:
            await anyio.sleep(HALTED_LOOK_MS / 1000)
            computed = computed_at_halt_s(process.pid)
            seen_ms = seen_ms + HALTED_LOOK_MS if computed is not None and computed == before else 0
            before = computed
            if seen_ms:
                await self._deliver(RunnerHalted(runner.runner_id, runner.attempt, seen_ms))

    async def _read(self, runner: _Runner, stdout: ByteReceiveStream) -> None:
        frames = wire.FrameBuffer()
        try:
            async for data in stdout:
                for body in frames.feed(data):
                    await self._deliver(RunnerSaid(runner.runner_id, runner.attempt, self._decoder.decode(body)))
        except (msgspec.DecodeError, wire.FrameTooLargeError) as error:
            _give_up(runner, f"it wrote something to its standard output that is no message: {error}")


def computed_at_halt_s(process_id: int) -> float | None:
    """The seconds that a process has computed, if a signal holds it now (not a debugger); None if not."""
    try:
        process = psutil.Process(process_id)
        times = process.cpu_times()
        return times.user + times.system if process.status() == psutil.STATUS_STOPPED else None
    except psutil.Error:  # it has ended, or another process has its number by now
        return None


def describe_exit(status: int) -> str:
    """As `subprocess` counts: below zero is a signal."""
    if status >= 0:
        return f"exit status {status}"
    return f"signal {-status} ({(signal.strsignal(-status) or 'unknown').lower()})"


def _environment(spec: RunnerSpec) -> dict[str, str]:
    """Ours, with the thread pools of the number libraries held to what was planned for this runner."""
    return {
        **os.environ,
        **dict.fromkeys(THREAD_VARIABLES, str(spec.thread_count)),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",  # its last words must reach the log
    }


def _give_up(runner: _Runner, fault: str) -> None:
    """For a runner that can't be talked to: asking it to end is no use."""
    runner.fault = runner.fault or fault
    runner.stop_wanted.set()


async def _write(runner: _Runner, stdin: ByteSendStream) -> None:
    with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):  # it has ended: `RunnerExited` says so
        async for command in runner.outgoing:
            await stdin.send(wire.pack(command))


async def _read_log(stderr: ByteReceiveStream, log: RunnerLog) -> None:
    async for data in stderr:
        log.write(data)


async def _stop_when_asked(runner: _Runner, process: Process) -> None:
    """Asks, then insists, then kills; the end of the process ends this task."""
    await runner.stop_wanted.wait()
    if not runner.fault:
        if runner.asks_first:
            with suppress(anyio.WouldBlock):
                runner.commands.send_nowait(ShutDown())
            await anyio.sleep(runner.grace_ms / 1000)
        _signal(process, signal.SIGTERM)
        await anyio.sleep(runner.grace_ms / 1000)
    _signal(process, signal.SIGKILL)


def _signal(process: Process, number: signal.Signals) -> None:
    """To the process and what it may have started; it leads a group of its own."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)


async def _reap(process: Process) -> None:
    """Kills it if it still runs, which it only does when our task was cancelled.

    Its pipes are closed only after its end, since `aclose` waits for that too, whoever cancels it.
    """
    _signal(process, signal.SIGKILL)
    await process.wait()
    await process.aclose()
