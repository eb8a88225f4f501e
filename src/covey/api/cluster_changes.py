"""What a client of `GET /cluster/stream` gets: the whole state once, then whole objects by their ids. Pure.

The feed keeps for each object the number of the change that last touched it, and the numbers at which others went. So
it can say what changed since any number, however long ago, in the space of what exists: nothing is queued for a client,
and one that reads slowly gets fewer, larger changes.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final, cast

from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

from covey.schema.cluster import ClusterState, Instance, Member, Wish
from covey.schema.ids import InstanceId, NodeId

REMOVALS_MAX: Final = 1024  # remembered; who missed more than that gets the whole state
ID_DIGITS_MAX: Final = 15

Key = tuple[str, str]  # kind ("members", "wishes", "instances", "leader", "notices") and id
LEADER: Final[Key] = ("leader", "")
NOTICES: Final[Key] = ("notices", "")


class Parts(Struct, frozen=True, omit_defaults=True):
    """Whole objects by id."""

    members: dict[NodeId, Member] = {}
    wishes: dict[str, Wish] = {}
    instances: dict[InstanceId, Instance] = {}


class Gone(Struct, frozen=True, omit_defaults=True):
    """Ids."""

    members: tuple[NodeId, ...] = ()
    wishes: tuple[str, ...] = ()
    instances: tuple[InstanceId, ...] = ()


NO_PARTS: Final = Parts()
NONE_GONE: Final = Gone()


class ClusterChange(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """`leader` is there only if another one leads (null: nobody), and `notices` only if they are others."""

    revision: int
    leader: NodeId | UnsetType | None = UNSET
    notices: tuple[str, ...] | UnsetType = UNSET
    added: Parts = NO_PARTS
    changed: Parts = NO_PARTS
    removed: Gone = NONE_GONE


def without_ages(state: ClusterState) -> ClusterState:
    """The state without what time alone changes, and without the counters that nobody can see a meaning in."""
    members = tuple(map(ageless, state.members))
    return replace(state, revision=0, members=members)


def ageless(member: Member) -> Member:
    report = member.report and replace(member.report, sequence=0)
    return replace(member, heard_ms_ago=0, report=report)


def objects(state: ClusterState) -> dict[Key, Any]:
    """Everything in `state` that a change can touch."""
    return {
        LEADER: state.leader,
        NOTICES: state.notices,
        **{("members", each.node_id): each for each in state.members},
        **{("wishes", each.wish_id): each for each in state.wishes},
        **{("instances", each.instance_id): each for each in state.instances},
    }


class Touched(Struct):
    """When an object came, and when it last changed."""

    value: Any  # without its age
    added: int
    changed: int


class ClusterFeed:
    """`life` tells this feed's numbers from those of another node, or of an earlier start of this one."""

    def __init__(self, life: str) -> None:
        self._life = life
        self._number = 0
        self._state: ClusterState | None = None
        self._touched: dict[Key, Touched] = {}
        self._removed: dict[Key, int] = {}  # oldest first
        self._complete_since = 0  # removals up to here are forgotten

    def see(self, state: ClusterState) -> None:
        """Takes in the latest snapshot. Cheap where it is the one that it had."""
        if state is self._state:
            return
        self._state = state
        found, number = objects(without_ages(state)), self._number + 1
        moved = [self._touch(key, value, number) for key, value in found.items()]
        gone = [key for key in self._touched if key not in found]
        for key in gone:
            del self._touched[key]
            self._removed.pop(key, None)
            self._removed[key] = number
        if any(moved) or gone:
            self._number = number
        self._forget_removals()

    @property
    def last_id(self) -> str:
        return f"{self._life}-{self._number}"

    def since(self, event_id: str | None) -> ClusterState | ClusterChange | None:
        """What a client that has `event_id` lacks: everything, a change, or nothing. After `see`."""
        assert self._state is not None, "it has seen a snapshot"
        number = self._number_of(event_id)
        if number is None:
            return self._state
        if number == self._number:
            return None
        return self._change(self._state, number)

    def _touch(self, key: Key, value: Any, number: int) -> bool:
        known = self._touched.get(key)
        if known is None:
            self._touched[key] = Touched(value, number, number)
            return True
        if known.value == value:
            return False
        known.value, known.changed = value, number
        return True

    def _forget_removals(self) -> None:
        while len(self._removed) > REMOVALS_MAX:
            oldest = next(iter(self._removed))
            self._complete_since = self._removed.pop(oldest)

    def _number_of(self, event_id: str | None) -> int | None:
        """None for an id that is not ours, or that is too old to tell what was removed since."""
        life, _, digits = (event_id or "").rpartition("-")
        if life != self._life or not digits.isdecimal() or len(digits) > ID_DIGITS_MAX:
            return None
        number = int(digits)
        return number if self._complete_since <= number <= self._number else None

    def _change(self, state: ClusterState, number: int) -> ClusterChange:
        current = objects(state)
        newer = {key: each for key, each in self._touched.items() if each.changed > number}
        leader_is_new, notices_are_new = (newer.pop(key, None) is not None for key in (LEADER, NOTICES))
        added = {key: current[key] for key, each in newer.items() if each.added > number}
        changed = {key: current[key] for key, each in newer.items() if each.added <= number}
        removed = [key for key, at in self._removed.items() if at > number and key not in self._touched]
        return ClusterChange(
            revision=state.revision,
            leader=state.leader if leader_is_new else UNSET,
            notices=state.notices if notices_are_new else UNSET,
            added=_parts(added),
            changed=_parts(changed),
            removed=_gone(removed),
        )


def _parts(found: Mapping[Key, Any]) -> Parts:
    by_kind: dict[str, dict[str, Any]] = {}
    for (kind, name), value in found.items():
        by_kind.setdefault(kind, {})[name] = value
    return Parts(**cast("dict[str, Any]", by_kind)) if by_kind else NO_PARTS


def _gone(keys: Iterable[Key]) -> Gone:
    by_kind: dict[str, tuple[str, ...]] = {}
    for kind, name in keys:
        by_kind[kind] = (*by_kind.get(kind, ()), name)
    return Gone(**cast("dict[str, Any]", by_kind)) if by_kind else NONE_GONE


def applied(state: ClusterState, change: ClusterChange) -> ClusterState:
    """The client's side: `state` with `change` made to it."""
    members = _merged({each.node_id: each for each in state.members}, change, "members")
    wishes = _merged({each.wish_id: each for each in state.wishes}, change, "wishes")
    instances = _merged({each.instance_id: each for each in state.instances}, change, "instances")
    return replace(
        state,
        revision=change.revision,
        leader=state.leader if change.leader is UNSET else change.leader,
        notices=state.notices if change.notices is UNSET else change.notices,
        members=tuple(members),
        wishes=tuple(wishes),
        instances=tuple(instances),
    )


def _merged(known: dict[Any, Any], change: ClusterChange, kind: str) -> list[Any]:
    """In the order of ids, as the state has them."""
    merged = {**known, **getattr(change.added, kind), **getattr(change.changed, kind)}
    gone = getattr(change.removed, kind)
    return [merged[name] for name in sorted(merged) if name not in gone]
