"""Fake runner processes: they listen, link to one another, load, warm up, and sometimes fail, each at its own pace.

A process accepts one link from the stage before it in a generation, once, and one from each lower rank of its stage;
what comes later, or of another one, is turned away. Ranks warm up together. One that has loaded outlives its
generation: it keeps its memory, and grows if it is told to hold more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from covey.schema.machine import RunnerExited, RunnerHalted, RunnerSaid, RunnerStarted
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
    RunnerCommand,
    RunnerMessage,
    RunnerSpec,
    WarmUp,
)

if TYPE_CHECKING:
    from simulation.host import Host

CONNECT_MS_MAX = 15_000
CLINGS_MS = 25_000
HALTED_LOOK_MS = 500
PORTS = 12  # so few that they are soon used again


class Process:
    """One runner process. `memory_bytes` is what it takes once its cache is full, and a part of that before."""

    def __init__(self, host: Host, spec: RunnerSpec, attempt: int, memory_bytes: int) -> None:
        self.host, self.world, self.boot = host, host.world, host.boot
        self.spec, self.key, self.memory_bytes = spec, (spec.runner_id, attempt), memory_bytes
        host.processes_begun += 1
        self.process_id = 1000 + host.processes_begun
        self.alive = True
        self.was_asked_to_stop = False
        self.has_failed = False  # before it was asked to stop, or by not getting on
        self.epoch = 0  # of its deeds
        self.has_stalled = False  # it lives, and does nothing any more
        self.is_known = False  # to its node
        self.steps = self.beats = 0
        self.is_busy = False
        self.resident_bytes = 0
        self.address: Address | None = None
        self.connect_until_ms = 0
        self.linked_to: Process | None = None
        self.linked_from: Process | None = None
        self.ranks: dict[int, Process] = {}  # the others of its stage
        self.is_warming_up = False
        self.is_connected = False
        self.has_loaded = False
        self.has_parted = False

    # ---- what its node does to it ----

    def start(self) -> None:
        if self.world.happens(self.world.faults.start_failure_percent):
            self.after(20, self.die, "could not be started: no such file")
            return
        self.after(20, self._started)

    def tell(self, command: RunnerCommand) -> None:
        if isinstance(command, ConnectTo):
            self.connect_until_ms = self.world.now_ms + CONNECT_MS_MAX
            if command.next_stage:
                self.after(20, self._connect, command.next_stage[0])
            for address in [ways[0] for ways in command.ranks[self.spec.rank + 1 :]]:
                self.after(20, self._connect, address)
        elif isinstance(command, Load):
            self.after(200, self._load, 1)
        elif isinstance(command, WarmUp):
            self.is_warming_up = True
            group = [self, *self.ranks.values()]
            if all(each.is_warming_up for each in group) and len(group) == self.spec.rank_count:
                for each in group:
                    each.after(200, each._phase, "warm up", Ready())  # noqa: SLF001 (another of its kind)

    def regroup(self, spec: RunnerSpec, memory_bytes: int) -> None:
        """What it was about to do in the former generation it leaves."""
        self._unlink()
        self.spec, self.memory_bytes, self.has_parted = spec, max(memory_bytes, self.resident_bytes), False
        self.after(100, self._say_listening)

    def stop(self, grace_ms: int, *, asks_first: bool) -> None:
        self.was_asked_to_stop, self.has_failed = True, self.has_failed or not asks_first
        hangs = self.world.faults.hangs
        wait_ms = (1 + asks_first) * grace_ms if hangs or self.has_stalled else 100
        if hangs and self.world.happens(20):  # not even SIGKILL ends what waits for a disk
            wait_ms += CLINGS_MS
        self.after(wait_ms, self.die, "exit status 0")

    # ---- its life ----

    def _started(self) -> None:
        self.is_known = True
        self.host.tell_machine(RunnerStarted(*self.key, self.process_id), self.boot)
        self.after(300, self._listen)

    def _listen(self) -> None:
        free = [
            Address(self.spec.listen_host, 9000 + port)
            for port in range(PORTS)
            if Address(self.spec.listen_host, 9000 + port) not in self.world.listeners
        ]
        if not free:
            self.after(300, self._listen)
            return
        self.address = self.world.random.choice(free)
        self.world.listeners[self.address] = self
        self._say_listening()

    def _say_listening(self) -> None:
        assert self.address is not None
        self.say(Listening(self.address.port))

    def _connect(self, address: Address) -> None:
        """Tries until a neighbour takes the link or time is up."""
        target = self.world.listeners.get(address)
        if target and self.host.reaches(target.host) and target.accept(self):
            self.check_connected()
            target.check_connected()
        elif self.world.now_ms >= self.connect_until_ms:
            self.part("connect", "a neighbour was not reached")
        else:
            self.after(200, self._connect, address)

    def accept(self, source: Process) -> bool:
        """Takes a link from the stage before this one, or from a lower rank of its own."""
        generation, theirs = ((each.instance_id, each.generation) for each in (self.spec, source.spec))
        if self.has_parted or theirs != generation:
            return False
        if source.spec.rank < self.spec.rank:
            return self._accept_rank(source)
        is_previous = (source.spec.stage_index + 1) % source.spec.stage_count == self.spec.stage_index
        if self.linked_from or not is_previous or self.spec.rank or source.spec.rank:
            return False
        self.linked_from, source.linked_to = source, self
        return True

    def _accept_rank(self, source: Process) -> bool:
        if source.spec.stage_index != self.spec.stage_index or source.spec.rank in self.ranks:
            return False
        self.ranks[source.spec.rank], source.ranks[self.spec.rank] = source, self
        return True

    def check_connected(self) -> None:
        is_in_ring = self.spec.rank > 0 or (self.linked_to and self.linked_from)
        if is_in_ring and len(self.ranks) == self.spec.rank_count - 1 and not self.is_connected:
            self.is_connected = True
            self.after(20, self._phase, "connect", Connected())

    def _load(self, part: int) -> None:
        layers = self.spec.shard.layer_end - self.spec.shard.layer_start
        taken_bytes = self.memory_bytes * part // (5 if self.world.faults.caches_fill else 4)
        self.resident_bytes = max(taken_bytes, self.resident_bytes)
        if part <= 3:
            self.say(LoadProgressed(layers * part // 4, layers, part, 4))
            self.after(self.world.faults.load_ms_max, self._load, part + 1)
        else:
            self.has_loaded = True
            self._phase("load", Loaded(self.resident_bytes))

    def _phase(self, phase: str, message: RunnerMessage) -> None:
        if self.world.happens(self.world.faults.phase_failure_percent):
            self.fail(phase, "something broke")
            return
        self.say(message)
        if isinstance(message, Ready):
            self._beat()
            self.after(5_000, self._serve, 1)

    def _beat(self) -> None:
        """As its thread does, until it stalls. (No chance is drawn: others' lives don't depend on it.)"""
        if self.alive and not self.has_stalled:
            self.beats += 1
            self.steps += self.is_busy
            self.say(Beat(self.steps, self.is_busy))
            self.world.at(self.world.now_ms + BEAT_MS, self._beat)

    def _look_at_halted(self, seen_ms: int) -> None:
        """Of what stalls every other one is held by a signal, which its node sees, as long as that is awake itself."""
        if not self.alive:
            return
        if not self.host.is_asleep:
            self.host.tell_machine(RunnerHalted(*self.key, seen_ms), self.boot)
            seen_ms += HALTED_LOOK_MS
        self.world.at(self.world.now_ms + HALTED_LOOK_MS, self._look_at_halted, seen_ms)

    def _serve(self, running: int) -> None:
        """Now and then a request, and rarely a crash."""
        if self.world.happens(self.world.faults.phase_failure_percent):
            self.die("signal 9 (killed)")
            return
        self.resident_bytes, self.is_busy = self.memory_bytes, running > 0
        if self.spec.stage_index == self.spec.rank == 0:
            self.say(Activity(running, 0))
        rests = self.world.faults.models_rest and not running
        self.after(90_000 if rests else 15_000, self._serve, 1 - running)

    def fail(self, phase: str, reason: str) -> None:
        """Says why, then ends by itself, or hangs until it is stopped."""
        self.has_failed = self.has_failed or not self.was_asked_to_stop
        self.say(PhaseFailed(phase, reason))
        if self.alive and not self.world.faults.hangs:
            self.after(50, self.die, "exit status 1")

    def lose_link(self) -> None:
        """A neighbour is gone. Some engines notice only when they next send."""
        if not self.world.faults.link_loss_goes_unnoticed:
            self.after(500, self.part, "serve", "a neighbour is gone")

    def part(self, phase: str, reason: str) -> None:
        """It waits for the next generation if it has something to keep."""
        if not self.has_loaded:
            self.fail(phase, reason)
            return
        self._unlink()
        self.has_parted = True
        self.say(Parted(reason))

    def _unlink(self) -> None:
        """Its neighbours learn of it, and whatever was still to come in this generation does not."""
        self.epoch += 1
        neighbours = [each for each in (self.linked_to, self.linked_from, *self.ranks.values()) if each]
        self.linked_to = self.linked_from = None
        self.ranks = {}
        self.is_connected = self.is_warming_up = False
        for neighbour in neighbours:
            if neighbour.alive and self in (neighbour.linked_to, neighbour.linked_from, *neighbour.ranks.values()):
                neighbour.lose_link()

    def die(self, description: str) -> None:
        """Ends, and its node reaps it."""
        if not self.alive:
            return
        self.vanish()
        self.host.safety.process_ended(self)
        self.host.answer(RunnerExited(*self.key, description, "the last line"), self.boot)
        self.world.at(self.world.now_ms + 1, self.host.look, self.boot)

    def vanish(self) -> None:
        """Ends without anybody being told: with its node."""
        self.alive = False
        self.host.processes.remove(self)
        if self.address:
            del self.world.listeners[self.address]
        self._unlink()

    def say(self, message: RunnerMessage) -> None:
        if self.alive:
            self.host.tell_machine(RunnerSaid(*self.key, message), self.boot)

    def after(self, delay_ms_max: int, action: object, *arguments: object) -> None:
        """Does something within `delay_ms_max`, if it still lives then."""
        self.world.after(delay_ms_max, self._if_alive, self.epoch, action, *arguments)

    def _if_alive(self, epoch: int, action: object, *arguments: object) -> None:
        """Any of its deeds may be the last, but it can always be ended. Those of a former generation are left."""
        if epoch != self.epoch and action not in (self.die, self._started, self._listen):
            return
        if not self.has_stalled and self.world.happens_rarely(self.world.faults.stall_permille):
            self.has_stalled = True
            if self.process_id % 2:
                self.world.at(self.world.now_ms + HALTED_LOOK_MS, self._look_at_halted, HALTED_LOOK_MS)
        if self.alive and (not self.has_stalled or action == self.die):
            assert callable(action)
            action(*arguments)
