"""One node's control machine: joins the parts, and is the one door to them.

After every input it does all that is due (`_advance`): what should be, minus what is. Nothing is due twice without
time or an answer between, so the driver can sleep until `deadline()`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from msgspec.structs import replace

from covey.control.cluster import FORGOTTEN, Cluster, Context, Written, wish_of
from covey.control.commands import Asking
from covey.control.deciding import Deciding
from covey.control.dormancy import lacks
from covey.control.downloads import Downloads
from covey.control.keeping import Keeping
from covey.control.leadership import Leadership
from covey.control.membership import Membership
from covey.control.replication import Replication
from covey.control.reports import Content, MemoryFigures, Reporter
from covey.control.runners import RunnerNews, Runners, World
from covey.control.settings import MachineSettings
from covey.control.tending import Tending
from covey.control.twins import COPIED, Twins
from covey.control.view import View
from covey.schema.cluster import (
    ApiKey,
    ClusterState,
    Command,
    CommandAnswer,
    CommandRequest,
    Forgotten,
    Heartbeat,
    Instance,
    IntentKept,
    IntentUpdate,
    NodeReport,
    PlaceModel,
    Rebalance,
    Refused,
)
from covey.schema.ids import NodeId
from covey.schema.machine import (
    CommandSubmitted,
    DeadlinePassed,
    Effect,
    EntriesKept,
    FetchFailed,
    FetchFinished,
    FetchProgressed,
    HardwareProbed,
    Input,
    KeepingFailed,
    LeaveRequested,
    Left,
    MessageReceived,
    ModelsListed,
    NetworkNoticed,
    Publish,
    RunnerExited,
    RunnerHalted,
    RunnerSaid,
    RunnerStarted,
    SendTo,
    Started,
    StateChanged,
)
from covey.schema.pipeline import cards_needed

LEAVING: Final = "this node is ending: ask another one."
MARK_CHARACTERS: Final = 8  # of a node's id, in the ids of instances; boot and counter do the rest within a node


class Machine:
    """Pure: `handle` is told the time, and gives back what is to be done."""

    def __init__(self, node_id: NodeId, boot: int, name: str, version: str, settings: MachineSettings) -> None:
        self.node_id = node_id
        self.boot = boot
        self.settings = settings
        self.membership = Membership(node_id, settings)
        self.leadership = Leadership(node_id, settings, self.membership)
        self.cluster = Cluster(node_id, settings.tombstones_max)
        self.keeping = Keeping(settings)
        self.replication = Replication(node_id, settings, self.cluster, self.keeping)
        self.tending = Tending(self.cluster, settings.memory_wait_ms)
        self.asking = Asking(node_id, settings)
        self.deciding = Deciding(node_id, boot, settings, self.membership, self.replication, self.keeping)
        self.twins = Twins(settings.life)
        self.downloads = Downloads(settings)
        self.runners = Runners(node_id, boot, settings)
        self.memory = MemoryFigures(settings)
        self.reporter = Reporter(node_id, boot, name, version, settings)
        self.view = View(settings, self.membership, self.cluster, self.reporter)
        self._now_ms: int | None = None  # of the last input
        self._started_ms = 0
        self._sequence = 0
        self._instance_counter = 0
        self._heartbeat_due_ms = 0
        self._tidy_due_ms = 0
        self._forget_until = 0
        self._is_leaving = False
        self._leaving_reason = ""
        self._has_left = False
        self._content_made: tuple[tuple[object, ...], Content] | None = None
        self._shown: tuple[object, ...] = ()
        self._revision = 0
        self._notices: tuple[str, ...] = ()
        self._notices_count = 0  # how often they changed
        self._inputs: dict[type, Callable[[int, Any], list[Effect]]] = {
            Started: self._on_started,
            DeadlinePassed: self._on_deadline,
            MessageReceived: self._on_message,
            HardwareProbed: self._on_hardware,
            ModelsListed: self._on_models,
            NetworkNoticed: self._on_network,
            CommandSubmitted: self._on_command,
            EntriesKept: self._on_kept,
            KeepingFailed: self._on_keeping_failed,
            FetchProgressed: self._on_fetch_progressed,
            FetchFinished: self._on_fetch_finished,
            FetchFailed: self._on_fetch_failed,
            RunnerStarted: self._on_runner,
            RunnerSaid: self._on_runner,
            RunnerHalted: self._on_runner,
            RunnerExited: self._on_runner,
            LeaveRequested: self._on_leave,
        }
        self._messages: dict[type, Callable[[int, Any], list[Effect]]] = {
            Heartbeat: self._on_heartbeat,
            NodeReport: self._on_report,
            IntentUpdate: self._on_intent_update,
            IntentKept: self._on_intent_kept,
            CommandRequest: self._on_request,
            CommandAnswer: self._on_answer,
        }

    # ---- the door ----

    def handle(self, now_ms: int, news: Input) -> list[Effect]:
        """Takes one input in; returns the effects, to be carried out in order."""
        if self._has_left:
            return []
        self._notice_gap(now_ms)
        self._now_ms = now_ms
        effects = self._inputs[type(news)](now_ms, news)
        return effects + self._advance(now_ms)

    def deadline(self) -> int | None:
        """When to send `DeadlinePassed`, unless something else happens before."""
        if self._now_ms is None or self._has_left:
            return None
        times = [
            self._heartbeat_due_ms,
            self.view.listened_ms,
            self.membership.deadline(),
            self.leadership.deadline(),
            self.asking.deadline(),
            self.deciding.deadline(),
            self.keeping.deadline(),
            self.downloads.deadline(),
            self.runners.deadline(),
            self.reporter.deadline(),
        ]
        # What was due by the last input has been dealt with, or waits for another input.
        return min(time for time in times if time is not None and time > self._now_ms)

    def state(self, now_ms: int) -> ClusterState:
        """The cluster as this node sees it."""
        return ClusterState(
            node_id=self.node_id,
            leader=self.leadership.leader,
            revision=self._revision,
            members=self.membership.members(now_ms, self.reporter.last),
            wishes=tuple(self.cluster.wishes.values()),
            instances=tuple(self.view.active(now_ms).values()),
            notices=(*self._notices, *self.runners.notices()),
        )

    def keys(self) -> tuple[ApiKey, ...]:
        """The API keys that are valid now, as far as this node knows."""
        return tuple(self.cluster.keys.values())

    # ---- inputs ----

    def _on_started(self, now_ms: int, news: Started) -> list[Effect]:
        self._started_ms = self.view.listening_since_ms = self._heartbeat_due_ms = now_ms
        self.cluster.restore(news.entries)
        self.keeping.change({key: None for key in news.entries if key not in self.cluster.entries})
        self._forget_until = news.forget_until
        return []

    def _on_deadline(self, _: int, __: DeadlinePassed) -> list[Effect]:
        return []

    def _on_message(self, now_ms: int, news: MessageReceived) -> list[Effect]:
        if self._leaving_reason:
            return []  # our name is another's: nothing more is said in it
        return self._messages[type(news.message)](now_ms, news.message)

    def _on_hardware(self, _: int, news: HardwareProbed) -> list[Effect]:
        if not self.runners.knows(news.resident_bytes):
            return []  # it was read before a runner ended; the next one comes at once
        self.runners.measure(news.resident_bytes)
        self.memory.probe(news.hardware, self.runners.held_bytes(), is_settled=not self.runners.is_memory_moving)
        return []

    def _on_models(self, now_ms: int, news: ModelsListed) -> list[Effect]:
        self.downloads.list_models(now_ms, news.model_ids)
        return []

    def _on_network(self, _: int, news: NetworkNoticed) -> list[Effect]:
        self._notices_count += news.notices != self._notices
        self._notices = news.notices
        return []

    def _on_command(self, now_ms: int, news: CommandSubmitted) -> list[Effect]:
        self.asking.submit(now_ms, news.command_id, news.command)
        return self.asking.refuse_all(LEAVING, self.deciding.promises) if self._is_leaving else []

    def _on_kept(self, now_ms: int, news: EntriesKept) -> list[Effect]:
        return self.deciding.hear_kept(now_ms, news) + self.keeping.hear_kept(news.token)

    def _on_keeping_failed(self, now_ms: int, news: KeepingFailed) -> list[Effect]:
        self.deciding.hear_failed(news)
        self.keeping.hear_failed(now_ms, news.token, news.reason)
        return []

    def _on_fetch_progressed(self, now_ms: int, news: FetchProgressed) -> list[Effect]:
        self.downloads.progress(now_ms, news)
        return []

    def _on_fetch_finished(self, _: int, news: FetchFinished) -> list[Effect]:
        self.downloads.finish(news)
        return []

    def _on_fetch_failed(self, now_ms: int, news: FetchFailed) -> list[Effect]:
        self.downloads.fail(now_ms, news)
        return []

    def _on_runner(self, now_ms: int, news: RunnerNews) -> list[Effect]:
        return self.runners.hear(now_ms, news)

    def _on_leave(self, now_ms: int, _: LeaveRequested) -> list[Effect]:
        """What is being written now can't be unsaid: its answer is awaited."""
        self._is_leaving = True
        self._heartbeat_due_ms = now_ms  # says so
        self.leadership.resign(now_ms)
        return self.asking.refuse_all(LEAVING, self.deciding.promises)

    # ---- messages ----

    def _on_heartbeat(self, now_ms: int, heartbeat: Heartbeat) -> list[Effect]:
        if heartbeat.node_id == self.node_id:
            return self._hear_twin(now_ms, heartbeat)
        arrived = self.membership.hear_heartbeat(now_ms, heartbeat)
        if heartbeat.node_id not in self.membership.peers:
            self.leadership.hear_goodbye(now_ms, heartbeat.node_id)
            return []
        greeting: list[Effect] = self._greet(now_ms, heartbeat.node_id) if arrived else []
        return greeting + self.replication.compare(now_ms, heartbeat)

    def _hear_twin(self, now_ms: int, heartbeat: Heartbeat) -> list[Effect]:
        """Of two living nodes with one identity the later one leaves, without a goodbye in the other's name."""
        if self._is_leaving or not self.twins.hear(now_ms, heartbeat):
            return []
        if self.twins.is_older(self._age_ms(now_ms), heartbeat):
            self.boot = self.reporter.boot = max(self.boot, heartbeat.boot + 1)
            return []
        self._leaving_reason = COPIED
        return self._on_leave(now_ms, LeaveRequested())

    def _on_report(self, now_ms: int, report: NodeReport) -> list[Effect]:
        is_new = report.node_id != self.node_id and self.membership.hear_report(now_ms, report)
        return self._greet(now_ms, report.node_id) if is_new else []

    def _on_intent_update(self, now_ms: int, update: IntentUpdate) -> list[Effect]:
        return self.replication.hear_update(now_ms, update)

    def _on_intent_kept(self, _: int, message: IntentKept) -> list[Effect]:
        if message.target == self.node_id:
            self.deciding.hear_copied(message)
        return []

    def _on_request(self, _: int, request: CommandRequest) -> list[Effect]:
        """Unless this node leads, the asker will find out who does and ask there."""
        if self.leadership.leads and request.origin != self.node_id:
            self.deciding.request(request)
        return []

    def _on_answer(self, _: int, answer: CommandAnswer) -> list[Effect]:
        return self.asking.answer(answer.command_id, answer.outcome) if answer.target == self.node_id else []

    # ---- what is due ----

    def _advance(self, now_ms: int) -> list[Effect]:
        self.membership.advance(now_ms)
        for node_id in self.view.broken_off(now_ms):
            self.membership.lose(now_ms, node_id)
        self.replication.forget(self.membership.peers)
        self._lead(now_ms)
        effects = [*self._ask(now_ms), *self._decide_next(now_ms), *self._tidy(now_ms), *self._work(now_ms)]
        effects += [*self._answer(now_ms), *self.keeping.advance(now_ms), *self._beat(now_ms), *self._report(now_ms)]
        seen = self._seen(now_ms)
        if self._shown != seen:
            self._shown = seen
            self._revision += 1
            effects.append(StateChanged())
        if self._is_leaving and self.runners.are_gone and self.keeping.is_free:
            self._has_left = True
            effects.append(Left(self._leaving_reason))
        return effects

    def _lead(self, now_ms: int) -> None:
        leader = self.leadership.leader
        if not self._is_leaving:
            self.leadership.advance(now_ms)
        if self.leadership.leader != leader:
            self.asking.hasten(now_ms)
            if self.leadership.leads:
                self._heartbeat_due_ms = now_ms  # the claim is news

    def _ask(self, now_ms: int) -> list[Effect]:
        effects = self.asking.expire(now_ms)
        leader = self.leadership.leader
        if leader is None:
            return effects
        for request in self.asking.due(now_ms):
            if self.leadership.leads:
                self.deciding.request(request)
            else:
                effects.append(SendTo(leader, request))
        return effects

    def _decide_next(self, now_ms: int) -> list[Effect]:
        """As leader: what was asked, one after the other, as fast as the disk takes it."""
        if not self.leadership.leads:
            self.deciding.queue.clear()
        effects: list[Effect] = []
        while request := self.deciding.next():
            effects += self._decide(now_ms, request)
        return effects

    def _answer(self, now_ms: int) -> list[Effect]:
        """To whoever asked, here or at another node."""
        effects = self.deciding.advance(now_ms, is_leaving=self._is_leaving)
        for told in self.deciding.take_told():
            command_id, origin = told.request.command_id, told.request.origin
            if origin == self.node_id:
                effects += self.asking.answer(command_id, told.outcome)
            else:
                effects.append(SendTo(origin, CommandAnswer(command_id, origin, told.outcome)))
        return effects

    def _tidy(self, now_ms: int) -> list[Effect]:
        """The leader's mending, once it has heard the others' maps."""
        led_ms = now_ms - self.leadership.led_since_ms
        settled = self.leadership.leads and led_ms >= self.settings.tidy_after_ms
        if not settled or now_ms < self._tidy_due_ms or self.view.is_learning(now_ms) or self.deciding.is_writing:
            return []
        self._tidy_due_ms = now_ms + self.settings.tidy_ms
        effects = self._write(now_ms, self._forgetting()) + self._write(now_ms, self.tending.leftovers())
        gone = self.view.gone(now_ms)
        self.tending.look_around(now_ms, gone, self.view.reports())
        for wish in list(self.cluster.wishes.values()):
            look = partial(self._context, now_ms, wish.wish_id, None)
            events = self.tending.mend(wish, look, self.view.reports(), gone)
            effects += self._write(now_ms, events)
        return effects

    def _work(self, now_ms: int) -> list[Effect]:
        """Downloads and runners, as assigned; a node that leaves has nothing assigned."""
        mine: list[Instance] = [] if self._is_leaving else self.view.assigned(now_ms)
        effects = self.downloads.advance(now_ms, cards_needed(mine, self.node_id))
        held = self.runners.held_bytes()
        free_bytes, is_fresh = self.memory.free_bytes(held), self.memory.is_fresh(held)
        world = World(mine, self.view.reports(), self.downloads.paths(), free_bytes, is_fresh)
        return effects + self.runners.advance(now_ms, world)

    def _beat(self, now_ms: int) -> list[Effect]:
        if now_ms < self._heartbeat_due_ms or self._leaving_reason:
            return []
        self._heartbeat_due_ms = now_ms + self.settings.heartbeat_ms
        return [Publish(self._heartbeat(now_ms))]

    def _report(self, now_ms: int) -> list[Effect]:
        report = self.reporter.advance(now_ms, self._content(), self._sequence + 1)
        if report is None or self._leaving_reason:
            return []
        self._sequence = report.sequence
        return [Publish(report)]

    # ---- pieces ----

    def _notice_gap(self, now_ms: int) -> None:
        """After a sleep nothing that was heard before counts as fresh."""
        if self._now_ms is not None and now_ms - self._now_ms > self.settings.sleep_ms:
            self.membership.wake(now_ms)
            self.leadership.resign(now_ms)
            self.runners.wake(now_ms, now_ms - self._now_ms)
            self.view.listening_since_ms = now_ms

    def _decide(self, now_ms: int, request: CommandRequest) -> list[Effect]:
        """As leader. While nodes are still to tell their memory nothing is placed; the asker repeats."""
        if isinstance(request.command, PlaceModel | Rebalance) and self.view.is_learning(now_ms):
            return []
        standing = self._standing(now_ms, request.command)
        context = replace(self._context(now_ms, request.command_id, request.origin, standing[:1]), standing=standing)
        decision = self.cluster.decide(request.command, context)
        if isinstance(decision, Refused):
            self.deciding.conclude(request, decision)
            return []
        known = {key: self.cluster.entries[key] for key in decision.keys}
        if not decision.events:
            return self.deciding.confirm(now_ms, request, decision.outcome, known)
        self._instance_counter += 1  # the mark of the context is in use now
        return self.deciding.promise(request, decision.outcome, known | self.cluster.stamp(decision.events))

    def _standing(self, now_ms: int, command: Command) -> tuple[Instance, ...]:
        """What `command` is to move: the instance, or the one that was assigned in its place. Then the others of its
        wish whose nodes are here: none of them is to be kept instead of it.
        """
        if not isinstance(command, Rebalance):
            return ()
        gone, wish_id, active = self.view.gone(now_ms), wish_of(command.instance_id), self.view.active(now_ms)
        whole = [each for each in self.cluster.instances.values() if each.wish_id == wish_id and not lacks(each, gone)]
        return tuple(
            sorted(whole, key=lambda each: (each.instance_id not in active, each.instance_id != command.instance_id))
        )

    def _write(self, now_ms: int, events: tuple[Written, ...]) -> list[Effect]:
        """Mending: in force at once, since it could be decided again; the disk follows."""
        if events:
            self._instance_counter += 1  # the mark of the last context may be in use now
        return self.replication.write(now_ms, events)

    def _forgetting(self) -> tuple[Written, ...]:
        """Deletions that this node has remembered for long enough, where some are left."""
        until, self._forget_until = self._forget_until, 0
        deleted = [entry.version.counter for entry in self.cluster.entries.values() if until and entry.value is None]
        return (Written(FORGOTTEN, Forgotten(until)),) if min(deleted, default=until + 1) <= until else ()

    def _context(self, now_ms: int, command_id: str, asked_at: NodeId | None, leaving: tuple[Instance, ...]) -> Context:
        """`leaving`: instances that end if this decision is taken."""
        return Context(
            command_id=command_id,
            asked_at=asked_at,
            instance_mark=f"{self.node_id[:MARK_CHARACTERS]}-{self.boot}-{self._instance_counter}",
            engine=self.settings.engine,
            nodes=self.view.candidates(now_ms, leaving),
        )

    def _heartbeat(self, now_ms: int) -> Heartbeat:
        self._sequence += 1
        hears, claim = self.membership.hears(now_ms), self.leadership.claim
        return Heartbeat(
            self.node_id,
            self.boot,
            self._sequence,
            hears,
            claim,
            self.cluster.digest,
            is_leaving=self._is_leaving,
            life=self.settings.life,
            age_ms=self._age_ms(now_ms),
        )

    def _age_ms(self, now_ms: int) -> int:
        return now_ms - self._started_ms

    def _greet(self, now_ms: int, node_id: NodeId) -> list[Effect]:
        """To a node that just came: that we hear it, and what we have to say, without waiting for the next beat."""
        greeting: list[Effect] = [SendTo(node_id, self._heartbeat(now_ms))]
        return greeting + ([SendTo(node_id, self.reporter.last)] if self.reporter.last else [])

    def _content(self) -> Content:
        """What the report would say; made anew only when one of its parts has changed."""
        parts = (self.runners.revision, self.downloads.revision, self.memory.revision, self.keeping.notices)
        if self._content_made is None or self._content_made[0] != parts:
            hardware = self.memory.show(self.runners.held_bytes())
            content = Content(
                api_address=self.settings.api_address,
                hardware=hardware,
                downloads=self.downloads.reports(),
                runners=self.memory.steady(self.runners.reports(), self.runners.keys()),
                models_on_disk=self.downloads.models_on_disk(),
                notices=self.keeping.notices,
            )
            self._content_made = (parts, content)
        return self._content_made[1]

    def _seen(self, now_ms: int) -> tuple[object, ...]:
        """Differs when the snapshot does. Which instances count changes with time, too."""
        parts = (self.membership, self.leadership, self.cluster, self.reporter)
        return (*(part.revision for part in parts), self._notices_count, *self.view.active(now_ms))
