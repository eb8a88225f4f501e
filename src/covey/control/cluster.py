"""Intent: what people asked for and what the leader assigned, as a map whose entries are merged by version.

`decide` may refuse; `apply` may not. Values are written under fresh keys and later deleted, never changed in place,
so that a merge of two maps can't mix two states of one thing. A wish's key is the id of the command that made it: the
same command again, even at another leader, finds what it did. An instance's id begins with its wish's id for the same
reason. Two leaders that don't see each other may carry one command out under two versions: what was deleted at one of
them is deleted, whichever version is higher (`merged`). Values stay encoded in the map; what a newer version wrote is
held and passed on unread.
"""

import heapq
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Final

import msgspec
from msgspec import Struct

from covey.control import keys
from covey.control.placement.again import place_anew, with_ranks
from covey.control.placement.nodes import Candidate
from covey.control.placement.place import Options, Placement, place
from covey.control.placement.refusal import CONFLICT
from covey.control.settings import COUNTER_LEAP_MAX, TOMBSTONES_MAX
from covey.schema.cluster import (
    Accepted,
    AddKey,
    ApiKey,
    Command,
    DeleteInstance,
    Entry,
    Forgotten,
    Instance,
    PlaceModel,
    Rebalance,
    Refused,
    RevokeKey,
    Stage,
    Value,
    Version,
    Wish,
)
from covey.schema.ids import InstanceId, NodeId, RunnerId
from covey.schema.model import Shard
from covey.schema.pipeline import is_regular

WISH: Final = "wish/"
INSTANCE: Final = "instance/"
KEY: Final = "key/"
FORGOTTEN: Final = "forgotten"
NOT_FOUND: Final = 404
NOBODY: Final = NodeId("")  # the writer of a version that follows from two others

Changes = dict[str, Entry | None]  # of a map; None: a deletion that is not remembered any more

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Value)


class Context(Struct, frozen=True, kw_only=True):
    """What a decision needs beside intent. `instance_mark` is fresh: it makes the id of a new instance unique."""

    command_id: str
    asked_at: NodeId | None
    instance_mark: str
    engine: str
    nodes: tuple[Candidate, ...]
    standing: tuple[Instance, ...] = ()  # for `Rebalance`: what is to be moved, and what else of its wish could serve


class Written(Struct, frozen=True):
    """One thing that was decided: this key has this value from now on; None deletes it."""

    key: str
    value: Value | None


class Decision(Struct, frozen=True):
    """What to write, and what to answer. `keys`: where it was written before, when the command came a second time."""

    events: tuple[Written, ...]
    outcome: Accepted
    keys: tuple[str, ...] = ()


class Cluster:
    """What this node holds of intent. `revision` grows with every change of it."""

    def __init__(self, node_id: NodeId, tombstones_max: int = TOMBSTONES_MAX) -> None:
        self.node_id = node_id
        self.tombstones_max = tombstones_max
        self.entries: dict[str, Entry] = {}  # in order of keys
        self.revision = 0
        self.counter = 0  # the highest of any version here, also of what is forgotten meanwhile
        self.wishes: dict[str, Wish] = {}  # by wish id, in order of keys
        self.instances: dict[InstanceId, Instance] = {}
        self.keys: dict[str, ApiKey] = {}  # by key id
        self.unread: tuple[str, ...] = ()  # keys of values that only a newer version understands
        self._values: dict[str, Value | None] = {}  # of what is not deleted; None: unread
        self._tombstones: dict[str, Entry] = {}
        self._digest = 0

    def decide(self, command: Command, context: Context) -> Decision | Refused:
        """What carrying `command` out means, or why it can't be."""
        match command:
            case PlaceModel():
                return self._decide_placement(command, context)
            case DeleteInstance():
                return self._decide_deletion(command)
            case Rebalance():
                return self._decide_rebalancing(command, context)
            case AddKey():
                return self._decide_addition(command)
            case RevokeKey():
                return self._decide_revocation(command)

    @property
    def digest(self) -> str:
        """The same text for the same map, on every node."""
        return f"{self._digest:032x}"

    def stamp(self, events: tuple[Written, ...]) -> dict[str, Entry]:
        """The entries of what was decided, newer than anything here; the map stays as it is."""
        return {
            event.key: Entry(encoded(event.value), Version(number, self.node_id))
            for number, event in enumerate(events, start=self.counter + 1)
        }

    def apply(self, events: tuple[Written, ...]) -> dict[str, Entry]:
        """Writes what was decided. Returns the entries for the other nodes."""
        written = self.stamp(events)
        self.merge(written)
        return written

    def merge(self, entries: Mapping[str, Entry]) -> Changes:
        """Takes in what is newer. Returns what is different now."""
        highest = self.counter + COUNTER_LEAP_MAX
        taken = {
            key: merged(entry, self.entries.get(key))
            for key, entry in entries.items()
            if 0 < entry.version.counter <= highest
        }
        newer = {key: entry for key, entry in taken.items() if entry != self.entries.get(key)}
        changes = {**newer, **dict.fromkeys(self._to_forget(newer))}
        changes = {key: entry for key, entry in changes.items() if entry is not None or key in self.entries}
        if changes:
            self._change(changes)
        return changes

    def restore(self, entries: Mapping[str, Entry]) -> None:
        """Begins with what this node's disk has kept."""
        self.counter = max((entry.version.counter for entry in entries.values()), default=0)
        self.merge(entries)

    def has(self, key: str) -> bool:
        """Whether it is there and not deleted, understood or not."""
        return key in self._values

    def _change(self, changes: Changes) -> None:
        entries = {**self.entries, **changes}
        for key, entry in changes.items():
            known = self.entries.get(key)
            self._digest ^= (_mark(key, known) if known else 0) ^ (_mark(key, entry) if entry else 0)
            self.counter = max(self.counter, entry.version.counter if entry else 0)
            self._index(key, entry)
        self.entries = {key: entry for key, entry in sorted(entries.items()) if entry}
        self.revision += 1
        values = [value for _, value in sorted(self._values.items())]
        self.wishes = {value.wish_id: value for value in values if isinstance(value, Wish)}
        self.instances = {value.instance_id: value for value in values if isinstance(value, Instance)}
        self.keys = {value.key_id: value for value in values if isinstance(value, ApiKey)}
        self.unread = tuple(key for key, value in sorted(self._values.items()) if value is None)

    def _index(self, key: str, entry: Entry | None) -> None:
        self._values.pop(key, None)
        self._tombstones.pop(key, None)
        if entry and entry.value is None:
            self._tombstones[key] = entry
        elif entry:
            value = value_of(entry)
            self._values[key] = value if value and _key_of(value) == key else None

    def _to_forget(self, newer: Mapping[str, Entry]) -> list[str]:
        """Deletions that the leader declared forgotten, and the oldest beyond the limit.

        Both follow from the merged map alone, so that every node that holds the same map forgets the same ones.
        """
        if FORGOTTEN not in newer and all(entry.value is not None for entry in newer.values()):
            return []  # as it was
        mark = newer.get(FORGOTTEN) or self.entries.get(FORGOTTEN)
        value = value_of(mark) if mark else None
        until = value.counter if isinstance(value, Forgotten) else 0
        known = [(entry.version, key) for key, entry in self._tombstones.items() if key not in newer]
        tombstones = known + [(entry.version, key) for key, entry in newer.items() if entry.value is None]
        forgotten = [key for version, key in tombstones if version.counter <= until]
        excess = heapq.nsmallest(max(len(tombstones) - self.tombstones_max, len(forgotten)), tombstones)
        return [key for _, key in excess]

    def _decide_placement(self, command: PlaceModel, context: Context) -> Decision | Refused:
        wish_id = context.command_id
        done = self._done_before(wish_id)
        if done:
            return Decision((), Accepted(done), (WISH + wish_id, INSTANCE + done))
        placement = place(command.card, context.nodes, options_asked_for(command, context.asked_at))
        if isinstance(placement, Refused):
            return placement
        wish = wish_asked_for(command, placement, wish_id)
        instance = assignment(wish, placement, context)
        events = (Written(WISH + wish_id, wish), Written(INSTANCE + instance.instance_id, instance))
        return Decision(events, Accepted(instance.instance_id))

    def _done_before(self, wish_id: str) -> InstanceId | None:
        """The instance, running or deleted, that an earlier arrival of the same command made."""
        if WISH + wish_id not in self.entries:
            return None
        made = [key.removeprefix(INSTANCE) for key in self.entries if key.startswith(INSTANCE)]
        same = [InstanceId(instance_id) for instance_id in made if wish_of(InstanceId(instance_id)) == wish_id]
        living = [instance_id for instance_id in same if instance_id in self.instances]
        return next(iter([*living, *same]), None)

    def _decide_deletion(self, command: DeleteInstance) -> Decision | Refused:
        """Deletes the wish too, and what else was assigned for it, else the leader would assign it again."""
        asked = command.instance_id
        is_wish = WISH + asked in self.entries  # one that waits for a place has no instance to be named by
        if not is_wish and INSTANCE + asked not in self.entries:
            return _no_instance(asked)
        wish_id = asked if is_wish else wish_of(asked)
        before = tuple(key for key in (WISH + wish_id, INSTANCE + asked) if key in self.entries)
        return Decision(self.without_wish(wish_id), Accepted(asked), before)

    def _decide_rebalancing(self, command: Rebalance, context: Context) -> Decision | Refused:
        """The same command again finds the instance that is in the place of the one that was named."""
        wish = self.wishes.get(wish_of(command.instance_id))
        if wish is None:
            return _no_instance(command.instance_id)
        if not context.standing:
            return Refused(
                "a node of it is gone: it is placed anew by itself as soon as there is room for it.", CONFLICT
            )
        instance = context.standing[0]
        placement = place_anew(instance, context.nodes, options_of(wish, context.nodes))
        if isinstance(placement, Refused):
            return placement
        moved = assignment(wish, placement, context)
        if instance.instance_id != command.instance_id or is_same(moved, instance):
            return Decision((), Accepted(instance.instance_id), (INSTANCE + instance.instance_id,))
        return Decision(replacement(context.standing, moved), Accepted(moved.instance_id))

    def _decide_addition(self, command: AddKey) -> Decision | Refused:
        """A key that was added before, even if it was revoked since, is not added again."""
        key = command.key
        if KEY + key.key_id in self.entries:
            return Decision((), Accepted(key.key_id), (KEY + key.key_id,))
        refused = keys.addition_refused(key, self.keys.values())
        return refused or Decision((Written(KEY + key.key_id, key),), Accepted(key.key_id))

    def _decide_revocation(self, command: RevokeKey) -> Decision | Refused:
        if KEY + command.key in self.entries and command.key not in self.keys:
            return Decision((), Accepted(command.key), (KEY + command.key,))  # revoked before: that is success
        found = keys.find(command.key, self.keys.values())
        if isinstance(found, Refused):
            return found
        return Decision((Written(KEY + found.key_id, None),), Accepted(found.key_id))

    def without_wish(self, wish_id: str) -> tuple[Written, ...]:
        """Deletes a wish and all that was assigned for it, understood or not.

        The wish also if it is not here: a write that ended torn may have brought its instance alone, and the others'
        copy of the wish would be assigned again.
        """
        living = [key for key in sorted(self._values) if key.startswith(INSTANCE)]
        mine = [key for key in living if wish_of(InstanceId(key.removeprefix(INSTANCE))) == wish_id]
        known = self.entries.get(WISH + wish_id)
        wish = [] if known and known.value is None else [WISH + wish_id]
        return tuple(Written(key, None) for key in [*wish, *mine])


def options_asked_for(command: PlaceModel, asked_at: NodeId | None) -> Options:
    return Options(
        node_count_min=command.node_count_min,
        context_length=command.context_length,
        slot_count=command.slot_count,
        node_ids=command.node_ids,
        quantize=command.quantize,
        exact=command.exact,
        rank_count=command.rank_count,
        draft=command.draft,
        kv_cache=command.kv_cache,
        asked_at=asked_at,
    )


def wish_asked_for(command: PlaceModel, placement: Placement, wish_id: str) -> Wish:
    """What `command` asks for, and what `placement` chose beside it."""
    return Wish(
        wish_id=wish_id,
        card=command.card,
        node_count_min=command.node_count_min,
        context_length=placement.context_length,
        slot_count=placement.slot_count,
        node_ids=command.node_ids,
        exact=command.exact,
        quantize=command.quantize,
        rank_count=command.rank_count,
        draft=command.draft,
        kv_cache=command.kv_cache,
    )


def assignment(wish: Wish, placement: Placement, context: Context) -> Instance:
    """The instance that serves `wish` as placed, under a fresh id."""
    instance_id = InstanceId(f"{wish.wish_id}.{context.instance_mark}")
    names = {node.node_id: node.name for node in context.nodes}
    stages = tuple(
        Stage(
            RunnerId(f"{instance_id}.{index}"),
            part.node_id,
            part.shard,
            part.memory_bytes,
            names[part.node_id],
            part.rank,
        )
        for index, part in enumerate(placement.parts)
    )
    return Instance(
        instance_id=instance_id,
        wish_id=wish.wish_id,
        card=wish.card,
        context_length=placement.context_length,
        slot_count=placement.slot_count,
        engine=context.engine,
        stages=stages,
        exact=wish.exact,
        quantize=wish.quantize,
        rank_count=placement.rank_count,
        draft=placement.draft,
        kv_cache=wish.kv_cache,
    )


def replacement(instances: Sequence[Instance], moved: Instance) -> tuple[Written, ...]:
    """`moved` in the place of `instances`."""
    deleted = [Written(INSTANCE + each.instance_id, None) for each in instances]
    return (Written(INSTANCE + moved.instance_id, moved), *deleted)


def is_same(first: Instance, second: Instance) -> bool:
    """Whether the same nodes hold the same: which share of which layers, and which draft."""
    return _shards(first) == _shards(second) and first.draft == second.draft


def _shards(instance: Instance) -> list[tuple[NodeId, Shard, int, int]]:
    return [(stage.node_id, stage.shard, stage.rank, instance.rank_count) for stage in instance.stages]


def options_of(wish: Wish, nodes: Sequence[Candidate]) -> Options:
    """For placing a wish again: on fewer nodes or with fewer ranks than it asked for, rather than not at all.

    Of the nodes that a person chose those that are here; where none is, all are named, and that is refused.
    """
    here = [node.node_id for node in nodes if node.node_id in wish.node_ids or not wish.node_ids]
    options = Options(
        node_count_min=min(wish.node_count_min, max(len(here), 1)),
        context_length=wish.context_length,
        slot_count=wish.slot_count,
        node_ids=(tuple(here) or wish.node_ids) if wish.node_ids else (),
        quantize=wish.quantize,
        exact=wish.exact,
        draft=wish.draft,
        kv_cache=wish.kv_cache,
    )
    return with_ranks(options, _rank_count(wish, len(here)))


def _rank_count(wish: Wish, here: int) -> int:
    """The most ranks for which there are nodes, of those that divide what was asked for."""
    return max((each for each in range(1, min(wish.rank_count, here) + 1) if wish.rank_count % each == 0), default=1)


def _no_instance(instance_id: InstanceId) -> Refused:
    return Refused(f"there is no instance {instance_id}: `covey ps` lists those there are.", NOT_FOUND)


def wish_of(instance_id: InstanceId) -> str:
    """The id of the wish that an instance was assigned for (marks hold no dot)."""
    return instance_id.rpartition(".")[0]


def merged(entry: Entry, known: Entry | None) -> Entry:
    """What is held of a key, of `entry` and what was known: the newer one, but what was deleted stays deleted.

    The deletion then counts as written after what it deletes. So a version never goes back, and whoever goes by
    versions alone ends with the same. In whatever order entries come, the highest of these versions remains.
    """
    if known is None or (entry.value is None) is (known.value is None):
        return entry if known is None or is_newer(entry, known) else known
    deletion, value = (entry, known) if entry.value is None else (known, entry)
    return Entry(None, max(deletion.version, Version(value.version.counter + 1, NOBODY)))


def is_newer(entry: Entry, known: Entry | None) -> bool:
    """Whether `entry` replaces `known`.

    A node that lost its memory may use a version twice; then the encoding decides, the same everywhere.
    """
    if known is None or entry.version != known.version:
        return known is None or entry.version > known.version
    return entry != known and _encoder.encode(entry) > _encoder.encode(known)


def encoded(value: Value | None) -> bytes | None:
    """As it stands in an `Entry`."""
    return None if value is None else _encoder.encode(value)


def value_of(entry: Entry) -> Value | None:
    """None where it was deleted, and for what only a newer version understands or nobody does."""
    if entry.value is None:
        return None
    try:
        value = _decoder.decode(entry.value)
    except msgspec.DecodeError:  # a validation error is one
        return None
    return None if isinstance(value, Instance) and not is_regular(value) else value


def _key_of(value: Value) -> str:
    """Where whoever wrote it must have written it."""
    match value:
        case Wish():
            return WISH + value.wish_id
        case Instance():
            return INSTANCE + value.instance_id
        case ApiKey():
            return KEY + value.key_id
        case Forgotten():
            return FORGOTTEN


def _mark(key: str, entry: Entry) -> int:
    """The part of one entry in the digest of a map, which is all of them, each added without carry."""
    return int.from_bytes(blake2b(_encoder.encode((key, entry)), digest_size=16).digest())
