"""The leader's side of commands: one after the other, each on disk before anybody acts on it or hears of it.

What was decided for a command becomes a promise. It is written to this disk first; then it enters the map and is sent
to the others; and when one of them has it on its own disk as well, whoever asked is told. If there is no other node, or
none confirms in time, the answer says so. If this disk takes nothing, the command is refused, and nothing has happened.
"""

from msgspec import Struct
from msgspec.structs import replace

from covey.control.commands import Answering
from covey.control.keeping import Keeping
from covey.control.membership import Membership
from covey.control.replication import Replication
from covey.control.settings import COMMANDS_QUEUED_MAX, KEEPERS_MAX, MachineSettings
from covey.schema.cluster import (
    Accepted,
    CommandOutcome,
    CommandRequest,
    Entry,
    IntentKept,
    IntentUpdate,
    Refused,
)
from covey.schema.ids import NodeId
from covey.schema.machine import Effect, EntriesKept, KeepingFailed, Publish

INSUFFICIENT_STORAGE = 507


class Promise(Struct):
    """What a command will have done. `token`: of the write to this disk, None once that is done."""

    request: CommandRequest
    outcome: Accepted
    entries: dict[str, Entry]
    is_new: bool  # else an earlier arrival of the command wrote it
    number: int
    token: int | None
    until_ms: int = 0  # a copy is waited for
    retry_ms: int = 0
    rounds: int = 0  # of asking for copies


class Told(Struct, frozen=True):
    """An outcome, for whoever asked."""

    request: CommandRequest
    outcome: CommandOutcome


class Deciding:
    """The queue of commands and the promises that are not answered yet. `told` is what is to be answered now."""

    def __init__(
        self,
        node_id: NodeId,
        boot: int,
        settings: MachineSettings,
        membership: Membership,
        replication: Replication,
        keeping: Keeping,
    ) -> None:
        self.node_id = node_id
        self.boot = boot
        self.settings = settings
        self.membership = membership
        self.replication = replication
        self.keeping = keeping
        self.answering = Answering()
        self.queue: dict[str, CommandRequest] = {}  # by command id
        self.promises: dict[str, Promise] = {}  # by command id
        self.told: list[Told] = []
        self.number = 0

    @property
    def is_writing(self) -> bool:
        """Whether something was decided that the map does not show yet."""
        return any(promise.is_new and promise.token is not None for promise in self.promises.values())

    def request(self, request: CommandRequest) -> None:
        """Answers what was answered before; the rest waits for its turn. One that finds no room is repeated anyway."""
        known = self.answering.outcomes.get(request.command_id)
        if known:
            self.told.append(Told(request, known))
        elif request.command_id not in self.promises and len(self.queue) < COMMANDS_QUEUED_MAX:
            self.queue.setdefault(request.command_id, request)

    def next(self) -> CommandRequest | None:
        """The oldest request, if the disk is free for what it may bring."""
        if not self.queue or not self.keeping.is_free:
            return None
        return self.queue.pop(next(iter(self.queue)))

    def conclude(self, request: CommandRequest, outcome: CommandOutcome) -> None:
        self.answering.remember(request.command_id, outcome)
        self.told.append(Told(request, outcome))

    def promise(self, request: CommandRequest, outcome: Accepted, decided: dict[str, Entry]) -> list[Effect]:
        """Begins to write what was `decided`; nobody sees it before that has ended well."""
        effect = self.keeping.write(decided)
        self._remember(Promise(request, outcome, decided, is_new=True, number=self.number + 1, token=effect.token))
        return [effect]

    def confirm(self, now_ms: int, request: CommandRequest, outcome: Accepted, known: dict[str, Entry]) -> list[Effect]:
        """The command came before, perhaps at another leader: what it wrote is in the map, and must be on disks too."""
        write = self.keeping.write({}) if self.keeping.unkept else None
        promise = Promise(request, outcome, known, is_new=False, number=self.number + 1, token=None)
        self._remember(promise)
        if write is None:
            return self._spread(now_ms, promise)
        promise.token = write.token
        return [write]

    def hear_kept(self, now_ms: int, news: EntriesKept) -> list[Effect]:
        """What was promised comes into the map and to the others."""
        effects: list[Effect] = []
        for promise in self._written_by(news.token):
            promise.token = None
            if promise.is_new:
                self.replication.take_kept(now_ms, promise.entries)
            effects += self._spread(now_ms, promise)
        return effects

    def hear_failed(self, news: KeepingFailed) -> None:
        """Nothing has happened. (What an earlier arrival of the command did stands; its asker may ask again.)"""
        for promise in self._written_by(news.token):
            del self.promises[promise.request.command_id]
            if promise.is_new:
                self.conclude(promise.request, Refused(news.reason, INSUFFICIENT_STORAGE))

    def hear_copied(self, news: IntentKept) -> None:
        for promise in list(self.promises.values()):
            if promise.token is None and news.write == (self.boot, promise.number):
                self._fulfil(promise, on_one_node_only=False)

    def advance(self, now_ms: int, *, is_leaving: bool) -> list[Effect]:
        """Asks again for copies, and stops waiting for them: when time is up, nobody is there, or this node ends."""
        effects: list[Effect] = []
        for promise in [each for each in self.promises.values() if each.token is None]:
            if is_leaving or now_ms >= promise.until_ms or not self.membership.visible(now_ms):
                self._fulfil(promise, on_one_node_only=True)
            elif now_ms >= promise.retry_ms:
                effects += self._ask_for_copies(now_ms, promise)
        return effects

    def deadline(self) -> int | None:
        waiting = [promise for promise in self.promises.values() if promise.token is None]
        return min((min(promise.until_ms, promise.retry_ms) for promise in waiting), default=None)

    def take_told(self) -> list[Told]:
        told, self.told = self.told, []
        return told

    def _remember(self, promise: Promise) -> None:
        self.promises[promise.request.command_id] = promise
        self.number = promise.number

    def _written_by(self, token: int) -> list[Promise]:
        return [promise for promise in self.promises.values() if promise.token == token]

    def _spread(self, now_ms: int, promise: Promise) -> list[Effect]:
        promise.until_ms = now_ms + self.settings.copy_wait_ms
        return self._ask_for_copies(now_ms, promise)

    def _ask_for_copies(self, now_ms: int, promise: Promise) -> list[Effect]:
        """To everybody; other nodes than in the round before are to confirm, if there are more."""
        visible = [peer.node_id for peer in self.membership.visible(now_ms)]
        first = promise.rounds * KEEPERS_MAX % max(1, len(visible))
        keepers = tuple([*visible[first:], *visible[:first]][:KEEPERS_MAX])
        promise.rounds += 1
        promise.retry_ms = now_ms + self.settings.copy_retry_ms
        return [Publish(IntentUpdate(self.node_id, promise.entries, (self.boot, promise.number), keepers))]

    def _fulfil(self, promise: Promise, *, on_one_node_only: bool) -> None:
        del self.promises[promise.request.command_id]
        self.conclude(promise.request, replace(promise.outcome, on_one_node_only=on_one_node_only))
