"""What happened lately, in words: found by comparing one snapshot with the next, kept in a bounded ring.

It watches and decides nothing. Each node tells what it saw itself, so two nodes' accounts may differ in order.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from covey.control.routing import is_ready, visible_reports
from covey.schema.activity import ActivityEvent, ActivityPage, EventKind
from covey.schema.cluster import (
    AddKey,
    ApiKey,
    ClusterState,
    Command,
    CommandOutcome,
    DeleteInstance,
    DownloadReport,
    DownloadState,
    Instance,
    Member,
    PlaceModel,
    Rebalance,
    Refused,
    RevokeKey,
    RunnerReport,
    TimedOut,
    Visibility,
)
from covey.schema.ids import InstanceId, NodeId
from covey.schema.model import KvCacheType
from covey.schema.runner import RunnerState

EVENTS_MAX: Final = 1000  # some 200 kB; a busy home's last days, a storm's last minutes
REPEATS_REMEMBERED: Final = 100  # events back
REPEATING: Final = frozenset({EventKind.DOWNLOAD_FAILED, EventKind.RUNNER_FAILED})
PRESENCE: Final = frozenset({EventKind.NODE_JOINED, EventKind.NODE_AWAY, EventKind.NODE_BACK})
TEXT_CHARACTERS_MAX: Final = 400  # a reason may hold a whole log

Note = tuple[EventKind, str, str]  # kind, subject, sentence


class Seen(Struct, frozen=True):
    """One look at the cluster."""

    state: ClusterState
    keys: tuple[ApiKey, ...]


class Activity:
    """The ring."""

    def __init__(self, events_max: int = EVENTS_MAX) -> None:
        self._events: deque[ActivityEvent] = deque(maxlen=events_max)
        self._before: Seen | None = None
        self._count = 0

    def see(self, at_ms: int, state: ClusterState, keys: tuple[ApiKey, ...]) -> None:
        """Notes what differs from the last look; the first look is where the account begins."""
        before, self._before = self._before, Seen(state, keys)
        for note in differences(before or Seen(_nothing(state), keys), self._before):
            if not (self._is_repeated(note) or self._is_first_sight(note)):
                self._note(at_ms, note)

    def hear(self, at_ms: int, command: Command, outcome: CommandOutcome) -> None:
        """Notes what was asked for here and not done; what was done shows in the snapshots."""
        asked, subject = _described(command)
        if isinstance(outcome, Refused):
            reason = _sentence(outcome.reason)
            self._note(at_ms, (EventKind.COMMAND_REFUSED, subject, f"{asked} was refused: {reason}"))
        elif isinstance(outcome, TimedOut):
            seconds = outcome.waited_ms / 1000
            text = f"{asked} was not answered by a leader within {seconds:.0f} s."
            self._note(at_ms, (EventKind.COMMAND_TIMED_OUT, subject, text))

    def page(self, after: int, limit: int) -> ActivityPage:
        """The oldest events with a number above `after` that are still kept, at most `limit`."""
        first_number = self._events[0].number if self._events else self._count + 1
        return ActivityPage(
            tuple(islice((event for event in self._events if event.number > after), limit)), first_number
        )

    def _note(self, at_ms: int, note: Note) -> None:
        kind, subject, text = note
        self._count += 1
        shortened = text if len(text) <= TEXT_CHARACTERS_MAX else text[: TEXT_CHARACTERS_MAX - 1] + "…"
        self._events.append(ActivityEvent(number=self._count, at_ms=at_ms, kind=kind, subject=subject, text=shortened))

    def _is_repeated(self, note: Note) -> bool:
        """What fails is tried again, for ever if need be; a reason that was told a moment ago is not told again."""
        kind, _, text = note
        latest = islice(reversed(self._events), REPEATS_REMEMBERED)
        return kind in REPEATING and any((event.kind, event.text) == (kind, text) for event in latest)

    def _is_first_sight(self, note: Note) -> bool:
        """A node whose name comes before it is heard in both directions has joined, and was never away."""
        kind, subject, _ = note
        before = (each.kind for each in reversed(self._events) if each.subject == subject and each.kind in PRESENCE)
        return kind is EventKind.NODE_BACK and next(before, None) is EventKind.NODE_JOINED


# ---- differences ----


def differences(before: Seen, after: Seen) -> Iterator[Note]:
    """What a person would tell of the way from one look to the next."""
    for find in (_nodes, _leader, _downloads, _instances, _runners, _keys):
        yield from find(before, after)


def _nodes(before: Seen, after: Seen) -> Iterator[Note]:
    """A node has joined once it has said its name."""
    old, new = _introduced(before.state), _introduced(after.state)
    for node_id, member in new.items():
        known, name = old.get(node_id), _name(after.state, node_id)
        if known is None:
            yield EventKind.NODE_JOINED, node_id, f"{name} joined."
        elif known.visibility is not member.visibility and member.visibility is Visibility.AWAY:
            yield EventKind.NODE_AWAY, node_id, f"{name} is away: it is not heard any more."
        elif known.visibility is not member.visibility:
            yield EventKind.NODE_BACK, node_id, f"{name} is back."
    here = {member.node_id for member in after.state.members}
    for node_id in old:
        if node_id not in here:
            was_away = old[node_id].visibility is Visibility.AWAY
            how = "has been away for too long and is not counted any more" if was_away else "has left"
            yield EventKind.NODE_LEFT, node_id, f"{_name(before.state, node_id)} {how}."


def _introduced(state: ClusterState) -> dict[NodeId, Member]:
    return {member.node_id: member for member in state.members if member.report}


def _met(before: Seen, after: Seen) -> ClusterState:
    """The cluster without the nodes that are new here: what they bring happened before."""
    known = _introduced(before.state)
    return replace(after.state, members=tuple(each for each in after.state.members if each.node_id in known))


def _leader(before: Seen, after: Seen) -> Iterator[Note]:
    leader = after.state.leader
    if leader == before.state.leader:
        return
    text = f"{_name(after.state, leader)} leads the cluster." if leader else "Nobody leads the cluster."
    yield EventKind.LEADER_CHANGED, leader or "", text


def _instances(before: Seen, after: Seen) -> Iterator[Note]:
    """As a state: to a node that joins or starts again, what was decided long before comes as a change, too."""
    old = {each.instance_id: each for each in before.state.instances}
    new = {each.instance_id: each for each in after.state.instances}
    were_ready = _ready(before.state)
    for instance_id, instance in new.items():
        if instance_id not in old:
            names = enumerated([_name(after.state, stage.node_id) for stage in instance.stages])
            text = f"{instance.card.model_id} is placed on {names}{_ways(instance)} as {instance_id}."
            yield EventKind.INSTANCE_PLACED, instance_id, text
    for instance_id in _ready(after.state):
        if instance_id not in were_ready:
            yield EventKind.INSTANCE_READY, instance_id, f"{new[instance_id].card.model_id} is ready as {instance_id}."
    for instance_id, instance in old.items():
        if instance_id not in new:
            text = f"{instance.card.model_id} is not placed as {instance_id} any more."
            yield EventKind.INSTANCE_REMOVED, instance_id, text


def _ways(instance: Instance) -> str:
    """What is particular about how it is placed, between commas."""
    shared = f", each layer shared by {instance.rank_count} of them" if instance.rank_count > 1 else ""
    draft = f", with {instance.draft.model_id} as its draft" if instance.draft else ""
    cache = "" if instance.kv_cache is KvCacheType.F32 else f", with a KV cache in {instance.kv_cache}"
    return f"{shared}{draft}{cache}," if shared or draft or cache else ""


def enumerated(names: Sequence[str]) -> str:
    """As in a sentence: "attic, second and third". At least one."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _ready(state: ClusterState) -> list[InstanceId]:
    reports = visible_reports(state)
    return [each.instance_id for each in state.instances if is_ready(each, reports)]


def _runners(before: Seen, after: Seen) -> Iterator[Note]:
    old = {report.runner_id: report for _, report in _runner_reports(before.state)}
    models = {stage.runner_id: each for each in after.state.instances for stage in each.stages}
    for node_id, report in _runner_reports(_met(before, after)):
        known = old.get(report.runner_id)
        had_failed = known is not None and known.state in (RunnerState.FAILED, RunnerState.STUCK)
        failed_before = known is not None and had_failed and known.attempt == report.attempt
        instance = models.get(report.runner_id)  # a runner whose instance was removed is lost to nobody
        has_failed = report.state is RunnerState.FAILED and not failed_before
        if instance and (has_failed or _was_started_again(known, report)):
            name = _name(after.state, node_id)
            text = f"The part of {instance.card.model_id} on {name} failed: {_sentence(report.reason)}"
            yield EventKind.RUNNER_FAILED, report.runner_id, text
        if report.state is RunnerState.STUCK and (known is None or known.state is not RunnerState.STUCK):
            yield EventKind.RUNNER_FAILED, report.runner_id, f"{_name(after.state, node_id)} {report.waiting}."


def _was_started_again(known: RunnerReport | None, report: RunnerReport) -> bool:
    """At once, so that nobody saw it fail. One that only begins anew with its neighbours keeps what it has loaded."""
    if known is None or known.state is RunnerState.FAILED or report.attempt == known.attempt:
        return False
    return bool(report.reason and known.layers_loaded and not report.layers_loaded)


def _runner_reports(state: ClusterState) -> Iterator[tuple[NodeId, RunnerReport]]:
    for member in state.members:
        for report in member.report.runners if member.report else ():
            yield member.node_id, report


def _downloads(before: Seen, after: Seen) -> Iterator[Note]:
    old = {(node_id, each.model_id): each for node_id, each in _download_reports(before.state)}
    for node_id, report in _download_reports(_met(before, after)):
        known, name = old.get((node_id, report.model_id)), _name(after.state, node_id)
        tell = _failed if report.reason else _TOLD_DOWNLOADS.get(report.state)
        note = tell(known, report, name) if tell and known != report else None
        if note:
            yield note


def _download_reports(state: ClusterState) -> Iterator[tuple[NodeId, DownloadReport]]:
    for member in state.members:
        for report in member.report.downloads if member.report else ():
            yield member.node_id, report


def _is_fetching(report: DownloadReport | None) -> bool:
    """Bytes have come. A file that was there already is "ongoing" for a moment, too."""
    return report is not None and report.state is DownloadState.ONGOING and report.bytes_done > 0


def _begun(known: DownloadReport | None, report: DownloadReport, name: str) -> Note | None:
    retried = known is not None and known.reason != ""
    if retried or _is_fetching(known) or not _is_fetching(report):
        return None
    return EventKind.DOWNLOAD_BEGUN, report.model_id, f"{name} began to download {report.model_id}."


def _completed(known: DownloadReport | None, report: DownloadReport, name: str) -> Note | None:
    if not _is_fetching(known):
        return None
    return EventKind.DOWNLOAD_COMPLETED, report.model_id, f"{name} has downloaded {report.model_id}."


def _failed(known: DownloadReport | None, report: DownloadReport, name: str) -> Note | None:
    if known is not None and known.reason:
        return None
    text = f"{name} could not download {report.model_id}: {_sentence(report.reason)}"
    return EventKind.DOWNLOAD_FAILED, report.model_id, text


_TOLD_DOWNLOADS: Final[dict[DownloadState, Callable[[DownloadReport | None, DownloadReport, str], Note | None]]] = {
    DownloadState.ONGOING: _begun,
    DownloadState.COMPLETED: _completed,
}


def _keys(before: Seen, after: Seen) -> Iterator[Note]:
    for key in after.keys:
        if key not in before.keys:
            yield EventKind.KEY_ADDED, key.key_id, f"The API key '{key.name}' ({key.key_id}) was added."
    for key in before.keys:
        if key not in after.keys:
            yield EventKind.KEY_REVOKED, key.key_id, f"The API key '{key.name}' ({key.key_id}) was revoked."


# ---- words ----


def _described(command: Command) -> tuple[str, str]:
    """What was asked for, and its subject."""
    match command:
        case PlaceModel():
            return f"Placing {command.card.model_id}", command.card.model_id
        case DeleteInstance():
            return f"Removing {command.instance_id}", command.instance_id
        case Rebalance():
            return f"Rebalancing {command.instance_id}", command.instance_id
        case AddKey():
            return f"Adding the API key '{command.key.name}'", command.key.key_id
        case RevokeKey():
            return f"Revoking the API key '{command.key}'", command.key


def _name(state: ClusterState, node_id: NodeId) -> str:
    report = next((member.report for member in state.members if member.node_id == node_id), None)
    return report.name if report else f"node {node_id[:8]}"


def _sentence(reason: str) -> str:
    """The first line of a reason: what follows is a log, for whoever looks at the runner."""
    first = reason.partition("\n")[0].strip() or "no reason was given"
    return first if first.endswith((".", "!", "?")) else f"{first}."


def _nothing(state: ClusterState) -> ClusterState:
    """A cluster in which nobody is yet."""
    return ClusterState(node_id=state.node_id, leader=None, revision=0, members=(), wishes=(), instances=())
