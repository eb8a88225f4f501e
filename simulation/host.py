"""One device of the world: it carries its machine's effects out, with fake files and processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from covey.control.machine import Machine
from covey.control.placement.memory import loading_bytes
from covey.schema.cluster import Command, Hardware, Stage
from covey.schema.ids import InstanceId, ModelId, NodeId
from covey.schema.machine import (
    AnswerCommand,
    CancelFetch,
    CommandSubmitted,
    DeadlinePassed,
    Effect,
    FetchFailed,
    FetchFinished,
    FetchProgressed,
    HardwareProbed,
    Input,
    KeepEntries,
    LeaveRequested,
    Left,
    ModelsListed,
    Publish,
    RegroupRunner,
    RunnerExited,
    SendTo,
    Started,
    StartFetch,
    StartRunner,
    StopRunner,
    TellRunner,
)
from covey.schema.runner import RunnerSpec
from simulation.clock import Clock
from simulation.disk import Disk
from simulation.processes import Process
from simulation.safety import Safety

if TYPE_CHECKING:
    from simulation.world import World

PROBE_MS = 3_000
DISK_BYTES = 10**12
FETCH_PARTS = 4


class Host:
    """A device, up or down. Its files outlive its node; its processes don't."""

    def __init__(self, world: World, node_id: NodeId, name: str, machine_id: str, memory_bytes: int) -> None:
        self.world, self.node_id, self.name = world, node_id, name
        self.machine_id, self.memory_bytes = machine_id, memory_bytes
        self.boot = 0
        self.machine: Machine | None = None
        self.clock = Clock()
        self.asleep_until_ms = 0
        self.deadline_ms: int | None = None  # by its own clock
        self.due_ms: int | None = None  # when, by the world's, it is to be told that time has passed
        self.processes: list[Process] = []
        self.processes_begun = 0
        self.greed_bytes = 0  # what other programs take beside their tenth of the memory
        self.files: dict[ModelId, int] = {}
        self.fetches: dict[ModelId, int] = {}  # the attempt that is under way
        self.disk = Disk(self)
        self.safety = Safety(self)

    # ---- its life ----

    def start(self) -> None:
        self.boot += 1
        self.clock.go_on(self.world.now_ms)
        self.machine = Machine(self.node_id, self.boot, self.name, "0.1.0", self.world.settings_of(self))
        self.safety.begin_life()
        self.tell_machine(Started(dict(self.disk.entries), self.forget_until()), self.boot)
        self.tell_machine(ModelsListed(tuple(sorted(self.files))), self.boot)
        self.world.after(100, self.probe, self.boot)

    def forget_until(self) -> int:
        """By its calendar, which may be wrong, some deletions are old."""
        deleted = [entry.version.counter for entry in self.disk.entries.values() if entry.value is None]
        return self.world.random.choice(sorted(deleted)) if deleted and self.world.forgets else 0

    def crash(self) -> None:
        self.world.note(f"{self.name} crashes")
        self.go()

    def go(self) -> None:
        """It is gone, with all its processes."""
        self.machine, self.deadline_ms, self.due_ms, self.asleep_until_ms = None, None, None, 0
        self.disk.cut_power()
        self.fetches.clear()
        for process in list(self.processes):
            process.vanish()

    def lose_file(self) -> None:
        """Somebody deletes a model file by hand; the node sees what is left."""
        if self.files:
            model_id = self.world.random.choice(sorted(self.files))
            del self.files[model_id]
            self.world.note(f"somebody deletes the file of {model_id} on {self.name}")
            self.tell_machine(ModelsListed(tuple(sorted(self.files))), self.boot)

    def leave(self) -> None:
        self.tell_machine(LeaveRequested(), self.boot)

    def sleep(self, until_ms: int) -> None:
        self.world.note(f"{self.name} sleeps until {until_ms}")
        self.asleep_until_ms = until_ms
        if self.world.faults.clocks_stop:
            self.clock.stand_still(self.world.now_ms, until_ms)
        self._plan()

    @property
    def now_ms(self) -> int:
        """By its own clock."""
        return self.clock.now_ms(self.world.now_ms)

    @property
    def is_up(self) -> bool:
        return self.machine is not None

    @property
    def is_asleep(self) -> bool:
        return self.world.now_ms < self.asleep_until_ms

    def reaches(self, other: Host) -> bool:
        return not self.world.network.is_cut(self.node_id, other.node_id) and not self.is_asleep

    def probe(self, boot: int) -> None:
        if boot == self.boot and self.is_up:
            self.look(boot)
            self.world.at(self.world.now_ms + PROBE_MS, self.probe, boot)

    def look(self, boot: int) -> None:
        held = {process.process_id: process.resident_bytes for process in self.processes if process.is_known}
        self.safety.probed_ms = self.world.now_ms
        self.tell_machine(HardwareProbed(self.hardware(), held), boot)

    def hardware(self) -> Hardware:
        return Hardware(
            machine_id=self.machine_id,
            machine_model="model",
            processor="processor",
            physical_cores=4,
            logical_cores=8,
            os_name="Linux",
            os_version="1",
            memory_bytes_total=self.memory_bytes,
            memory_bytes_available=self.free_bytes(),
            swap_bytes_total=0,
            swap_bytes_available=0,
            disk_bytes_total=DISK_BYTES,
            disk_bytes_available=DISK_BYTES,
        )

    def free_bytes(self) -> int:
        """A tenth is other programs', sometimes more, and the machine may be shared."""
        return max(0, self.memory_bytes * 9 // 10 - self.greed_bytes - self.world.resident_bytes(self.machine_id))

    def fits(self, stage: Stage, effects: Sequence[Effect] = ()) -> bool:
        """Whether a runner fits into what its processes, and those that start now, leave free, now and when probed."""
        assert self.machine is not None
        records, figures = self.machine.runners.runners, self.machine.memory
        starting = sum(records[each.runner_id].stage.memory_bytes for each in effects if isinstance(each, StartRunner))
        needed = loading_bytes(stage.memory_bytes) + starting + sum(self.growth_bytes(each) for each in effects)
        to_take = sum(process.memory_bytes - process.resident_bytes for process in self.processes)
        held = {process.key: process.memory_bytes for process in self.processes}
        to_take_when_probed = sum(max(0, count - figures.held_at_probe.get(key, 0)) for key, count in held.items())
        probed_bytes = figures.probed.memory_bytes_available if figures.probed else 0
        return needed + to_take <= self.free_bytes() and needed + to_take_when_probed <= probed_bytes

    def growth_bytes(self, effect: Effect) -> int:
        """What a process will take beyond what it was told to hold before."""
        if not isinstance(effect, RegroupRunner):
            return 0
        process = next((each for each in self.processes if each.key == (effect.runner_id, effect.attempt)), None)
        return max(0, self.counted_bytes(effect.spec) - process.memory_bytes) if process else 0

    def counted_bytes(self, spec: RunnerSpec) -> int:
        """What the placement counted for it."""
        assert self.machine is not None
        stages = self.machine.cluster.instances[InstanceId(spec.instance_id)].stages
        return next(each.memory_bytes for each in stages if each.runner_id == spec.runner_id)

    # ---- its machine ----

    def submit(self, command_id: str, command: Command) -> None:
        self.safety.submitted(command_id)
        self.tell_machine(CommandSubmitted(command_id, command), self.boot)

    def tell_machine(self, news: Input, boot: int) -> None:
        """Now, or when it wakes; never to another life."""
        if self.machine is None or boot != self.boot:
            return
        if self.is_asleep:
            self.world.at(self.asleep_until_ms, self.tell_machine, news, boot)
            return
        self.safety.before(news)
        effects = self.machine.handle(self.now_ms, news)
        self.deadline_ms = self.machine.deadline()
        self._plan()
        self.world.record(self, news, effects)
        self.safety.check(news, effects)
        for effect in effects:
            self.carry_out(effect)

    def _plan(self) -> None:
        if self.deadline_ms is None:
            return
        due_ms = max(self.clock.world_ms(self.deadline_ms), self.asleep_until_ms)
        if due_ms != self.due_ms:
            self.due_ms = due_ms
            self.world.at(due_ms, self._pass_deadline, due_ms, rank=1 + self.world.hosts.index(self))

    def answer(self, news: Input, boot: int) -> None:
        """The end of a fetch or a process; it may come a second time, when it is stale."""
        self.tell_machine(news, boot)
        if self.world.happens(self.world.faults.echo_percent):
            self.world.after(5_000, self.tell_machine, news, boot)

    def _pass_deadline(self, due_ms: int) -> None:
        """Unless another deadline, or another life, has come since."""
        if due_ms == self.due_ms:
            self.due_ms = None
            self.tell_machine(DeadlinePassed(), self.boot)

    def carry_out(self, effect: Effect) -> None:
        if isinstance(effect, Publish):
            self.world.publish(self, effect.message)
        elif isinstance(effect, SendTo):
            self.world.send(self, effect.target, effect.message)
        elif isinstance(effect, KeepEntries):
            self.disk.write(effect)
        elif isinstance(effect, AnswerCommand):
            self.world.people.hear_answer(effect.command_id, effect.outcome)
        elif isinstance(effect, Left):
            self.world.note(f"{self.name} has left{': ' if effect.reason else ''}{effect.reason}")
            self.go()
        else:
            self.work(effect)

    def work(self, effect: Effect) -> None:
        """Files and processes."""
        if isinstance(effect, StartFetch):
            self.fetches[effect.card.model_id] = effect.attempt
            self.world.after(50, self.fetch, effect, 0, self.boot)
        elif isinstance(effect, CancelFetch):
            self.fetches.pop(effect.model_id, None)
        elif isinstance(effect, StartRunner):
            self.start_process(effect)
        elif isinstance(effect, RegroupRunner | TellRunner | StopRunner):
            for process in self.processes:
                if process.key == (effect.runner_id, effect.attempt):
                    self.pass_on(process, effect)
                    return
            if isinstance(effect, StopRunner):  # it ended by itself a moment ago; saying so again must do no harm
                gone = RunnerExited(effect.runner_id, effect.attempt, "was not running", "")
                self.world.after(5, self.tell_machine, gone, self.boot)

    def pass_on(self, process: Process, effect: RegroupRunner | TellRunner | StopRunner) -> None:
        if isinstance(effect, TellRunner):
            process.tell(effect.command)
        elif isinstance(effect, RegroupRunner):
            process.regroup(effect.spec, self.counted_bytes(effect.spec))
        else:
            process.stop(effect.grace_ms, asks_first=effect.asks_first)

    def start_process(self, effect: StartRunner) -> None:
        process = Process(self, effect.spec, effect.attempt, self.counted_bytes(effect.spec))
        self.processes.append(process)
        process.start()

    def fetch(self, effect: StartFetch, part: int, boot: int) -> None:
        """A part at a time; a file that is there is found at once."""
        model_id, size = effect.card.model_id, effect.card.file_bytes
        if boot != self.boot or self.fetches.get(model_id) != effect.attempt:
            return
        if self.world.happens(self.world.faults.fetch_failure_percent // FETCH_PARTS) and model_id not in self.files:
            del self.fetches[model_id]
            self.safety.fetch_failed(model_id)
            self.answer(FetchFailed(model_id, effect.attempt, "the connection was reset"), boot)
        elif part == FETCH_PARTS or model_id in self.files:
            del self.fetches[model_id]
            self.files[model_id] = size
            self.answer(FetchFinished(model_id, effect.attempt, f"/models/{model_id}", size), boot)
        else:
            self.tell_machine(FetchProgressed(model_id, effect.attempt, size * part // FETCH_PARTS, size), boot)
            self.world.after(self.world.faults.fetch_ms_max, self.fetch, effect, part + 1, boot)
