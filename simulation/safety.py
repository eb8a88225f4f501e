"""What must hold after every step of every node, whatever the faults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from covey.control.cluster import INSTANCE, value_of, wish_of
from covey.control.machine import Machine
from covey.control.membership import NEVER, Moment
from covey.control.runner_table import Runner
from covey.schema.cluster import (
    Accepted,
    CommandAnswer,
    Entry,
    Heartbeat,
    Instance,
    IntentKept,
    IntentUpdate,
    NodeReport,
    Value,
    Visibility,
    Wish,
)
from covey.schema.ids import InstanceId, ModelId, NodeId, RunnerId
from covey.schema.machine import (
    AnswerCommand,
    Effect,
    Input,
    KeepEntries,
    Left,
    MessageReceived,
    Publish,
    RegroupRunner,
    SendTo,
    Started,
    StartFetch,
    StartRunner,
)
from covey.schema.model import KvCacheType
from covey.schema.pipeline import cards_needed
from covey.schema.runner import BEAT_MS
from simulation.failure import Failure
from simulation.pace import Pace
from simulation.people import is_creation, subject

if TYPE_CHECKING:
    from simulation.host import Host
    from simulation.processes import Process

EFFECTS_MAX = 120  # of one step


class Safety:
    """Watches one host. What it remembers of a life ends with it; what nodes hold is remembered by the world."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.world = host.world
        self.begin_life()

    def begin_life(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.intent_revision = 0
        self.members: dict[NodeId, Moment] = {}  # the latest moment of those who are members
        self.forgotten: dict[NodeId, Moment] = {}  # and of those who were
        self.reports: dict[NodeId, Moment] = {}
        self.waiting: dict[str, int] = {}  # commands: when they were submitted
        self.attempts: dict[RunnerId, tuple[int, int]] = {}  # (attempt, when it was started)
        self.generations: dict[RunnerId, int] = {}  # the last that a process of it took part in
        self.ended_ms: dict[RunnerId, int] = {}  # when its last process did
        self.probed_ms = -1  # when its memory was last looked at
        self.failures: dict[RunnerId, list[int]] = {}  # when its processes ended unasked
        self.well: set[RunnerId] = set()  # of those, who was well until its last failure
        self.lacking: set[RunnerId] = set()  # runners that wait for memory
        self.fetch_failures: dict[ModelId, tuple[int, int]] = {}  # (when, intent revision)
        self.heartbeats: dict[NodeId, Heartbeat] = {}  # the newest that has arrived of each node
        self.newest: dict[NodeId, Moment] = {}  # of each node, of whatever it said
        self.heard_ms: dict[NodeId, int] = {}
        self.left: dict[NodeId, int] = {}  # the boot that said goodbye
        self.stale: Heartbeat | NodeReport | None = None  # what has arrived now, and says nothing new
        self.last_ms: int | None = None  # of the last step
        self.woke_ms = -(10**9)
        self.assigned: frozenset[RunnerId] = frozenset()  # to this node, before the step and after it
        self.pace = Pace(self.host)

    # ---- what the world tells ----

    def submitted(self, command_id: str) -> None:
        self.waiting[command_id] = self.host.now_ms

    def process_ended(self, process: Process) -> None:
        """It may have another runner by now than the one that it was last told to be."""
        assert self.host.machine is not None
        records = self.host.machine.runners.runners
        owners = [runner_id for runner_id, each in records.items() if each.has_process and each.key == process.key]
        runner_id = owners[0] if owners else process.spec.runner_id
        self.ended_ms[runner_id] = self.world.now_ms
        if process.has_failed or not process.was_asked_to_stop:
            self._failed(runner_id, process)

    def _failed(self, runner_id: RunnerId, process: Process) -> None:
        """What was well until then may be tried again at once, and that does not count."""
        assert self.host.machine is not None
        settings = self.host.machine.settings
        was_well = process.steps * BEAT_MS >= settings.runner_proven_ms
        was_well = was_well or process.beats * BEAT_MS >= settings.runner_healthy_ms
        self.failures[runner_id] = [] if was_well else [*self.failures.get(runner_id, []), self.host.now_ms]
        self.well.discard(runner_id)
        self.well |= {runner_id} if was_well else set()

    def fetch_failed(self, model_id: ModelId) -> None:
        assert self.host.machine is not None
        self.fetch_failures[model_id] = (self.host.now_ms, self.host.machine.cluster.revision)

    def kept(self, effect: KeepEntries) -> None:
        """The disk holds what is there, and no more deletions than are remembered, beside what this write brought."""
        assert self.host.machine is not None
        deleted = sum(entry.value is None for entry in self.host.disk.entries.values())
        if deleted > self.host.machine.settings.tombstones_max + len(effect.entries):
            self._fail(f"its disk holds {deleted} deletions")

    # ---- before every step ----

    def before(self, news: Input) -> None:
        """Takes the time, and whether a message is stale by what this life has received so far."""
        now_ms, machine = self.host.now_ms, self.host.machine
        assert machine is not None
        if self.last_ms is not None and now_ms - self.last_ms > machine.settings.sleep_ms:
            self.woke_ms = now_ms
        self.last_ms, self.stale = now_ms, None
        self.assigned = self._assigned(machine)
        self.pace.hear(news)
        message = news.message if isinstance(news, MessageReceived) else None
        if isinstance(message, Heartbeat):
            newest = self.heartbeats.get(message.node_id)
            if newest is None or (message.boot, message.sequence) > (newest.boot, newest.sequence):
                self.heartbeats[message.node_id] = message
            if message.is_leaving:
                self.left[message.node_id] = max(message.boot, self.left.get(message.node_id, 0))
        if isinstance(message, Heartbeat | NodeReport):
            moment = (message.boot, message.sequence)
            self.stale = message if moment <= self.newest.get(message.node_id, NEVER) else None
            self.newest[message.node_id] = max(moment, self.newest.get(message.node_id, NEVER))

    # ---- after every step ----

    def check(self, news: Input, effects: Sequence[Effect]) -> None:
        machine = self.host.machine
        assert machine is not None
        self._check_deadline(effects)
        if isinstance(news, Started):
            self._check_restored(machine)
        if machine.cluster.revision != self.intent_revision:
            self._check_intent(machine)
        self._check_members(machine)
        self._check_seen(machine)
        self._check_lacks(machine, effects)
        has_reported = any(isinstance(effect, Publish) and isinstance(effect.message, NodeReport) for effect in effects)
        # What it reports at the end of a step (another instance of the wish is ready) counts from the next one on.
        self.assigned = self._assigned(machine) | (self.assigned if has_reported else frozenset())
        for effect in effects:
            self.pace.check(machine, effect)
            self._check_effect(machine, effect)
        if not isinstance(news, MessageReceived):
            self._check_decided(machine, effects)
        self._check_waiting(machine)

    def _check_deadline(self, effects: Sequence[Effect]) -> None:
        deadline_ms = self.host.deadline_ms
        if deadline_ms is not None and deadline_ms <= self.host.now_ms:
            self._fail(f"its deadline {deadline_ms} has passed, it would spin")
        if len(effects) > EFFECTS_MAX:
            self._fail(f"one step had {len(effects)} effects")

    def _check_restored(self, machine: Machine) -> None:
        for key, entry in self.host.disk.entries.items():
            if machine.cluster.entries.get(key) != entry and not (self.world.forgets and entry.value is None):
                self._fail(f"{key} was on its disk, and not in its map at the start")

    def _check_intent(self, machine: Machine) -> None:
        now = machine.cluster.entries
        before = {} if self.world.forgets else self.entries
        for key, entry in before.items():
            if key not in now:
                self._fail(f"{key} vanished from its map")
            if now[key].version < entry.version:
                self._fail(f"{key} went back from {entry.version} to {now[key].version}")
        written = {key: entry for key, entry in now.items() if self.entries.get(key) != entry}
        self.entries, self.intent_revision = now, machine.cluster.revision
        self._check_written(machine, written)
        for key, entry in written.items():
            is_new = (key, entry.version) not in self.world.ledger.written and entry.version.writer == self.host.node_id
            if entry.value is None and key.startswith(INSTANCE) and is_new:
                self._check_dropped(machine, wish_of(InstanceId(key.removeprefix(INSTANCE))))
        self.world.ledger.hold(self.host, written)
        deleted = [entry for entry in now.values() if entry.value is None]
        if len(deleted) > machine.settings.tombstones_max:
            self._fail(f"it remembers {len(deleted)} deletions")

    def _check_written(self, machine: Machine, written: Mapping[str, Entry], *, is_command: bool = False) -> None:
        values = {key: value_of(entry) for key, entry in written.items() if not self.world.ledger.knows(key)}
        fresh: dict[str, Value] = {key: value for key, value in values.items() if value}
        for value in fresh.values():
            if isinstance(value, Instance):
                self._check_single(machine, written, value)
                self._check_memory(machine, written, fresh, value)
                self._check_chosen(machine, fresh, value)
                self._check_there(machine, value)
                if not is_command:
                    self.pace.mend(machine, value)

    def _check_single(self, machine: Machine, written: Mapping[str, Entry], assigned: Instance) -> None:
        """A leader assigns a wish only while no other assignment of it can be served, or in the place of that."""
        for other in machine.state(self.host.now_ms).instances:
            if INSTANCE + other.instance_id in written:
                continue
            if other.wish_id == assigned.wish_id and other.instance_id != assigned.instance_id:
                self._fail(f"{assigned.wish_id} was assigned again beside {other.instance_id}")

    def _check_dropped(self, machine: Machine, wish_id: str) -> None:
        """Nobody ends the only assignment of a wish that stands: it may run where we can't see it."""
        remaining = [each.wish_id for each in machine.cluster.instances.values()]
        if wish_id in machine.cluster.wishes and wish_id not in remaining:
            self._fail(f"it dropped the last assignment of {wish_id}, which nobody deleted")

    def _check_memory(
        self, machine: Machine, written: Mapping[str, Entry], fresh: Mapping[str, Value], instance: Instance
    ) -> None:
        """What a leader assigned, with all that it knew to be assigned, is no more than the machines have.

        It does not know on which machine a node is that it has not heard, or that has left.
        """
        standing = machine.state(self.host.now_ms).instances
        known = {each.instance_id: each for each in standing if INSTANCE + each.instance_id not in written}
        known.update((value.instance_id, value) for value in fresh.values() if isinstance(value, Instance))
        for stage in instance.stages:
            host = self.world.host(stage.node_id)
            present = [self.host.node_id, *machine.membership.peers]
            sharers = [each for each in present if self.world.host(each).machine_id == host.machine_id]
            stages = [each for other in known.values() for each in other.stages]
            taken = sum(each.memory_bytes for each in stages if each.node_id in sharers)
            if taken > host.memory_bytes:
                self._fail(f"{taken} bytes are assigned to {host.name}, which has {host.memory_bytes}")

    def _check_chosen(self, machine: Machine, fresh: Mapping[str, Value], instance: Instance) -> None:
        """Who chose nodes gets no others, however often the leader has to mend."""
        wish = machine.cluster.wishes.get(instance.wish_id) or fresh.get(f"wish/{instance.wish_id}")
        for stage in instance.stages:
            if isinstance(wish, Wish) and wish.node_ids and stage.node_id not in wish.node_ids:
                self._fail(f"{instance.instance_id} is on {stage.node_id}, which nobody chose for it")

    def _check_there(self, machine: Machine, instance: Instance) -> None:
        """Nothing is assigned to a node that is not here."""
        for stage in instance.stages:
            if not machine.membership.is_visible(self.host.now_ms, stage.node_id):
                self._fail(f"{instance.instance_id} is assigned to {stage.node_id}, which is not here")

    def _check_members(self, machine: Machine) -> None:
        peers = machine.membership.peers
        for node_id, peer in peers.items():
            latest = machine.membership.seen[node_id]
            if node_id not in self.members and latest <= self.forgotten.get(node_id, NEVER):
                self._fail(f"it took {node_id} back, though it said nothing new")
            if peer.boot <= self.left.get(node_id, 0):
                self._fail(f"it counts on {node_id}, which has said goodbye")
            self.members[node_id] = latest
            if peer.report:
                moment = (peer.report.boot, peer.report.sequence)
                if moment < self.reports.get(node_id, NEVER):
                    self._fail(f"the report of {node_id} went back to {moment}")
                self.reports[node_id] = moment
        for node_id in [node_id for node_id in self.members if node_id not in peers]:
            self.forgotten[node_id] = self.members.pop(node_id)

    def _check_seen(self, machine: Machine) -> None:
        """Who is visible has said so lately, and what it said before its last start counts no more."""
        for node_id, peer in machine.membership.peers.items():
            newest = self.heartbeats.get(node_id)
            if peer.shown is Visibility.VISIBLE and (newest is None or self.host.node_id not in newest.hears):
                self._fail(f"it sees {node_id}, which does not hear it")
            if newest and peer.report and peer.report.boot < newest.boot:
                self._fail(f"it keeps what {node_id} reported before it started anew")
            if self.stale and self.stale.node_id == node_id and peer.heard_ms > self.heard_ms.get(node_id, -1):
                self._fail(f"what {node_id} said long ago was taken for a sign of life")
            self.heard_ms[node_id] = peer.heard_ms

    def _check_lacks(self, machine: Machine, effects: Sequence[Effect]) -> None:
        """What waits for memory does not fit, unless what other nodes of its machine freed is not probed yet."""
        is_alone = [host.machine_id for host in self.world.hosts].count(self.host.machine_id) == 1
        lacking = {runner_id for runner_id, runner in machine.runners.runners.items() if _lacks(runner)}
        for runner_id in lacking - self.lacking if is_alone else ():
            if self.host.fits(machine.runners.runners[runner_id].stage, effects):
                self._fail(f"{runner_id} waits for memory, and yet it would fit")
        self.lacking = lacking

    def _check_waiting(self, machine: Machine) -> None:
        limit_ms = machine.settings.command_timeout_ms
        for command_id, since_ms in self.waiting.items():
            if self.host.now_ms - since_ms > limit_ms:
                self._fail(f"command {command_id} was not answered within {limit_ms} ms")

    # ---- effects ----

    def _check_effect(self, machine: Machine, effect: Effect) -> None:
        if isinstance(effect, StartRunner):
            self._check_start(machine, effect)
        elif isinstance(effect, RegroupRunner):
            self._check_regroup(machine, effect)
        elif isinstance(effect, StartFetch):
            self._check_fetch(machine, effect)
        elif isinstance(effect, AnswerCommand):
            self.waiting.pop(effect.command_id, None)
        elif isinstance(effect, KeepEntries):
            self._check_kept(machine, effect)
        elif isinstance(effect, Left) and self.host.disk.under_way:
            self._fail("it leaves in the middle of a write")
        elif isinstance(effect, SendTo):
            self._check_sent(machine, effect)
        elif isinstance(effect, Publish):
            self._check_published(machine, effect)

    def _check_kept(self, machine: Machine, effect: KeepEntries) -> None:
        """What was decided for a command is seen here first."""
        entries = {key: entry for key, entry in effect.entries.items() if entry}
        if not effect.entries:
            self._fail("it writes nothing to its disk")
        self._check_written(machine, entries, is_command=True)
        for key, entry in entries.items():
            self.world.ledger.write(self.host, key, entry)

    def _check_start(self, machine: Machine, effect: StartRunner) -> None:
        runner_id, now_ms = effect.runner_id, self.host.now_ms
        if runner_id not in self.assigned:
            self._fail(f"it starts {runner_id}, which is not assigned to it")
        heirs = {key for other, key in machine.runners.keys().items() if other != runner_id}  # of what was its own
        if any(each.spec.runner_id == runner_id and each.key not in heirs for each in self.host.processes):
            self._fail(f"it starts {runner_id} while a process of that runner lives")
        attempt, started_ms = self.attempts.get(runner_id, (0, -(10**9)))
        if effect.attempt <= attempt:
            self._fail(f"attempt {effect.attempt} of {runner_id} follows attempt {attempt}")
        if now_ms - started_ms < machine.settings.runner_spacing_ms:
            self._fail(f"{runner_id} is started twice within {now_ms - started_ms} ms")
        self._check_files(effect)
        self.attempts[runner_id] = (effect.attempt, now_ms)
        self.generations[runner_id] = max(effect.attempt, self.generations.get(runner_id, 0))
        if self.probed_ms < self.ended_ms.get(runner_id, 0):
            self._fail(f"it starts {runner_id} before it has seen what memory its last process left free")
        self._check_room(effect)
        self._check_back_off(machine, runner_id)

    def _check_files(self, effect: StartRunner | RegroupRunner) -> None:
        """The head of what has a draft is told of that, and nobody else; all of the type of the cache."""
        assert self.host.machine is not None
        instance = self.host.machine.cluster.instances[InstanceId(effect.spec.instance_id)]
        wants = instance.draft is not None and effect.spec.runner_id == instance.stages[0].runner_id
        if wants is not (effect.spec.draft is not None):
            self._fail(f"{effect.spec.runner_id} is told of {effect.spec.draft or 'no draft'}")
        kind = effect.spec.engine_options.get("kv_cache", KvCacheType.F32)
        if kind != instance.kv_cache:
            self._fail(f"{effect.spec.runner_id} is told to keep {kind}, not {instance.kv_cache}")

    def _assigned(self, machine: Machine) -> frozenset[RunnerId]:
        stages = [stage for instance in machine.view.assigned(self.host.now_ms) for stage in instance.stages]
        return frozenset(stage.runner_id for stage in stages if stage.node_id == self.host.node_id)

    def _check_regroup(self, machine: Machine, effect: RegroupRunner) -> None:
        """A process begins anew for a runner that is assigned, in a generation that this one was not in."""
        runner_id = effect.spec.runner_id
        if effect.spec.generation <= self.generations.get(runner_id, 0):
            self._fail(f"{runner_id} begins generation {effect.spec.generation} again")
        self._check_files(effect)
        self.generations[runner_id] = effect.spec.generation
        if not any(process.key == (effect.runner_id, effect.attempt) for process in self.host.processes):
            return  # it ended by itself a moment ago
        if machine.runners.runners[runner_id].stage.shard != effect.spec.shard:
            self._fail(f"{runner_id} is told to hold other layers than are assigned to it")
        if self.host.growth_bytes(effect):
            self._check_room(effect)

    def _check_room(self, effect: StartRunner | RegroupRunner) -> None:
        """A node starts only what fits beside its other processes, whatever was assigned to it."""
        others = [each for each in self.host.processes if each.key != (effect.runner_id, effect.attempt)]
        held = [each.resident_bytes if each.was_asked_to_stop else each.memory_bytes for each in others]
        taken = self.host.counted_bytes(effect.spec) + sum(held)
        if taken > self.host.memory_bytes:
            self._fail(f"it starts {effect.runner_id}, and its runners need {taken} of {self.host.memory_bytes} bytes")

    def _check_back_off(self, machine: Machine, runner_id: RunnerId) -> None:
        failures = self.failures.get(runner_id, [])
        steps_ms = machine.settings.runner_back_off_ms
        recent = [at_ms for at_ms in failures if at_ms > self.host.now_ms - machine.settings.runner_healthy_ms]
        if failures and runner_id not in self.well and self.host.now_ms - failures[-1] < steps_ms[0]:
            self._fail(f"{runner_id} is started {self.host.now_ms - failures[-1]} ms after it failed")
        if len(recent) > len(steps_ms):
            self._fail(f"{runner_id} is started again after {len(recent)} failures in a minute")

    def _check_fetch(self, machine: Machine, effect: StartFetch) -> None:
        model_id = effect.card.model_id
        if model_id not in cards_needed(machine.state(self.host.now_ms).instances, self.host.node_id):
            self._fail(f"it fetches {model_id}, which no assignment needs")
        if model_id in self.host.fetches:
            self._fail(f"it fetches {model_id} twice at once")
        failed_ms, revision = self.fetch_failures.get(model_id, (-(10**9), -1))
        too_soon = self.host.now_ms - failed_ms < machine.settings.fetch_back_off_ms[0]
        if too_soon and revision == machine.cluster.revision:
            self._fail(f"it fetches {model_id} {self.host.now_ms - failed_ms} ms after that failed")

    def _check_decided(self, machine: Machine, effects: Sequence[Effect]) -> None:
        """Answers that this node gave as leader to whoever asked here."""
        for effect in effects:
            if isinstance(effect, AnswerCommand) and machine.leadership.leads:
                self._check_accepted(machine, effect)

    def _check_accepted(self, machine: Machine, effect: AnswerCommand | CommandAnswer) -> None:
        """Whoever decided has it in its map and on its disk. (A node that passes an answer on need not have it yet.)"""
        if not isinstance(effect.outcome, Accepted) or self.world.forgets:
            return
        command = self.world.people.asked[effect.command_id]
        key, creates = subject(command, effect.outcome), is_creation(command)
        entry = machine.cluster.entries.get(key)
        if creates and entry is None and not self.world.ledger.knows(key):
            self._fail(f"command {effect.command_id} was accepted, but {key} was never written")
        if not creates and entry is not None and entry.value is not None:
            self._fail(f"the deletion of {key} was accepted, but it is still there")
        keepers = [
            host
            for host in self.world.hosts
            if key in host.disk.entries and (creates or host.disk.entries[key].value is None)
        ]
        self._check_durable(effect.outcome, key, keepers)

    def _check_durable(self, outcome: Accepted, key: str, keepers: Sequence[Host]) -> None:
        """On the disk of whoever decided, and on another one unless the answer says otherwise."""
        if self.host not in keepers:
            self._fail(f"{key} was accepted, but is not on its disk")
        if keepers == [self.host] and not outcome.on_one_node_only and key not in self.world.ledger.copies_lost:
            self._fail(f"{key} was accepted as if on two nodes, but is on no other disk")

    def _check_sent(self, machine: Machine, effect: SendTo) -> None:
        """To somebody who is there, but for an answer that was owed when it left."""
        message = effect.message
        if isinstance(message, CommandAnswer):
            self._check_accepted(machine, message)
        if effect.target not in machine.membership.peers and not isinstance(message, CommandAnswer | IntentKept):
            self._fail(f"it sends a {type(message).__name__} to {effect.target}, which is not there")

    def _check_published(self, machine: Machine, effect: Publish) -> None:
        now_ms = self.host.now_ms
        update = effect.message if isinstance(effect.message, IntentUpdate) else None
        is_new = update and not update.write[1]  # what was promised to somebody before the sleep is kept
        if is_new and now_ms - self.woke_ms < machine.settings.leaderless_ms:
            self._fail(f"it decides {now_ms - self.woke_ms} ms after it slept")

    def _fail(self, sentence: str) -> None:
        raise Failure(f"{self.host.name}: {sentence}")


def _lacks(runner: Runner) -> bool:
    """Whether it waits for memory, and not for its former process to end."""
    return bool(runner.waiting) and not runner.has_process
