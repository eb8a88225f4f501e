"""The world: hosts, the network between them, and the order in which things happen."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from hashlib import blake2b
from random import Random
from typing import Any

import msgspec

from covey.control.settings import TOMBSTONES_MAX, MachineSettings, PhaseLimits
from covey.schema.cluster import CommandAnswer, IntentKept, MeshMessage
from covey.schema.ids import NodeId
from covey.schema.machine import Effect, Input, MessageReceived
from covey.schema.runner import Address
from simulation.faults import NONE, Faults
from simulation.host import Host
from simulation.ledger import Ledger
from simulation.network import Network
from simulation.people import People
from simulation.processes import Process

# The real ones but for shorter limits and back-off, so that budgets are used up within a run.
SETTINGS = MachineSettings(
    engine="fake",
    memory_wait_ms=15_000,
    runner_back_off_ms=(1_000, 2_000, 4_000),
    fetch_back_off_ms=(1_000, 2_000, 4_000, 8_000),
    limits=PhaseLimits(connect_ms=20_000, load_ms=10_000, warm_up_ms=5_000, step_ms=10_000),
)

Moment = tuple[int, int, int, Callable[..., None], tuple[Any, ...]]


class World:
    """Virtual time in whole milliseconds, from 0. Everything random comes from one generator."""

    def __init__(self, random: Random, faults: Faults = NONE, settings: MachineSettings | None = None) -> None:
        self.random = random
        self.faults = faults
        self.settings = settings or SETTINGS
        self.tombstones_max = faults.tombstones_max
        self.network = Network(random, faults)
        self.people = People(self)
        self.ledger = Ledger()
        self.hosts: list[Host] = []
        self.listeners: dict[Address, Process] = {}
        self.now_ms = 0
        self.step_count = 0
        self.observer: Callable[[Host | None, Input | str, list[Effect]], None] | None = None
        self._queue: list[Moment] = []
        self._queued = 0
        self._hash = blake2b(digest_size=8)
        self._encoder = msgspec.msgpack.Encoder()

    # ---- hosts ----

    def add(self, name: str, memory_bytes: int, machine_id: str | None = None) -> Host:
        """A device that is still off. Node ids are not in the order of names."""
        node_id = NodeId(blake2b(name.encode(), digest_size=16).hexdigest())
        host = Host(self, node_id, name, machine_id or f"machine of {name}", memory_bytes)
        self.hosts.append(host)
        return host

    def copy(self, host: Host, name: str) -> Host:
        """Another device with a copy of `host`'s data folder."""
        copied = Host(self, host.node_id, name, f"machine of {name}", host.memory_bytes)
        copied.boot = host.boot
        self.hosts.append(copied)
        return copied

    def host(self, node_id: str) -> Host:
        return next(host for host in self.hosts if host.node_id == node_id)

    def up(self) -> list[Host]:
        """Hosts whose node runs, asleep or not."""
        return [host for host in self.hosts if host.is_up]

    def settings_of(self, host: Host) -> MachineSettings:
        """The limit of deletions is a part of the world: `heal` does not change it."""
        return msgspec.structs.replace(
            self.settings,
            life=f"{host.name} {host.boot}",
            listen_host=f"{host.machine_id}.test",
            tombstones_max=min(self.settings.tombstones_max, self.tombstones_max),
        )

    def resident_bytes(self, machine_id: str) -> int:
        """What loaded runners take of a machine."""
        return sum(
            process.resident_bytes for host in self.hosts if host.machine_id == machine_id for process in host.processes
        )

    def heal(self) -> None:
        """From now on nothing goes wrong any more."""
        self.note("faults stop")
        self.faults = NONE
        self.network.heal(NONE)
        for host in self.hosts:
            host.disk.is_full = False

    @property
    def forgets(self) -> bool:
        """Whether deletions may be forgotten so early that what was deleted comes back."""
        return self.tombstones_max < TOMBSTONES_MAX

    # ---- time ----

    def at(self, when_ms: int, action: Callable[..., None], *arguments: Any, rank: int = 0) -> None:
        """Of what happens in one millisecond the lowest rank comes first, then what was known first."""
        self._queued += 1
        heapq.heappush(self._queue, (when_ms, rank, self._queued, action, arguments))

    def after(self, delay_ms_max: int, action: Callable[..., None], *arguments: Any) -> None:
        """Within so many milliseconds from now."""
        self.at(self.now_ms + self.random.randint(1, delay_ms_max), action, *arguments)

    def happens_rarely(self, permille: int) -> bool:
        return permille > 0 and self.random.randrange(1000) < permille

    def happens(self, percent: int) -> bool:
        return percent > 0 and self.random.randrange(100) < percent

    def run_until(self, until_ms: int) -> None:
        """Lets everything happen that is due before `until_ms`."""
        while self._queue and self._queue[0][0] < until_ms:
            when_ms, _, _, action, arguments = heapq.heappop(self._queue)
            self.now_ms = max(self.now_ms, when_ms)
            action(*arguments)
        self.now_ms = until_ms

    def awaited(self) -> str | None:
        """A sentence if somebody is still to start, or memory still to be given back."""
        names = [action.__name__ for _, _, _, action, _ in self._queue]
        if "_start" in names:
            return "somebody is still to start"
        return "another program is still to give memory back" if "_take_memory" in names else None

    # ---- messages ----

    def publish(self, source: Host, message: MeshMessage) -> None:
        for target in self.hosts:
            if target is not source:
                self._carry(source, target, message)

    def send(self, source: Host, target_id: NodeId, message: MeshMessage) -> None:
        for target in self.hosts:
            if target.node_id == target_id and target is not source:
                self._carry(source, target, message)

    def _carry(self, source: Host, target: Host, message: MeshMessage) -> None:
        if isinstance(message, IntentKept | CommandAnswer) and self.happens(self.faults.acknowledgement_loss_percent):
            return
        for arrival_ms in self.network.arrivals_ms(self.now_ms, source.node_id, target.node_id):
            self.at(arrival_ms, self._arrive, target, message)

    @staticmethod
    def _arrive(target: Host, message: MeshMessage) -> None:
        if target.is_up and not target.is_asleep:
            target.tell_machine(MessageReceived(message), target.boot)

    # ---- the record ----

    def record(self, host: Host, news: Input, effects: list[Effect]) -> None:
        """Everything that a machine was told and answered goes into the digest of the run."""
        self.step_count += 1
        self._hash.update(self._encoder.encode((self.now_ms, host.node_id, news, effects)))
        if self.observer:
            self.observer(host, news, effects)

    def note(self, sentence: str) -> None:
        """Something that happened to the world itself."""
        self._hash.update(f"{self.now_ms} {sentence}".encode())
        if self.observer:
            self.observer(None, sentence, [])

    def digest(self) -> str:
        return self._hash.hexdigest()
