"""Intent: what people asked for and what the leader assigned, as a map whose entries are merged by version.

`decide` may refuse; `apply` may not. Values are written under fresh keys and later deleted, never changed in place,
so that a merge of two maps can't mix two states of one thing. A wish's key is the id of the command that made it: the
same command again, even at another leader, finds what it did. An instance's id begins with its wish's id for the same
reason.
"""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Final

import msgspec
from msgspec import Struct

from covey.control import keys
from covey.control.placement.nodes import Candidate
from covey.control.placement.place import Options, Placement, place
from covey.control.settings import COUNTER_LEAP_MAX, TOMBSTONES_MAX
from covey.schema.cluster import (
    Accepted,
    AddKey,
    ApiKey,
    Command,
    CommandOutcome,
    DeleteInstance,
    Entry,
    Instance,
    PlaceModel,
    Refused,
    RevokeKey,
    Stage,
    Value,
    Version,
    Wish,
)
from covey.schema.ids import InstanceId, NodeId, RunnerId

WISH: Final = "wish/"
INSTANCE: Final = "instance/"
KEY: Final = "key/"
NOT_FOUND: Final = 404

_encoder = msgspec.msgpack.Encoder()


class Context(Struct, frozen=True, kw_only=True):
    """What a decision needs beside intent. `instance_mark` is fresh: it makes the id of a new instance unique."""

    command_id: str
    asked_at: NodeId | None
    instance_mark: str
    engine: str
    nodes: tuple[Candidate, ...]


class Written(Struct, frozen=True):
    """One thing that was decided: this key has this value from now on; None deletes it."""

    key: str
    value: Value | None


class Decision(Struct, frozen=True):
    """What to write, and what to answer."""

    events: tuple[Written, ...]
    outcome: CommandOutcome


class Cluster:
    """What this node holds of intent. `revision` grows with every change of it."""

    def __init__(self, node_id: NodeId) -> None:
        self.node_id = node_id
        self.entries: dict[str, Entry] = {}
        self.revision = 0
        self.wishes: dict[str, Wish] = {}  # by wish id, in order of keys
        self.instances: dict[InstanceId, Instance] = {}
        self.keys: dict[str, ApiKey] = {}  # by key id
        self.digest = digest({})

    def decide(self, command: Command, context: Context) -> Decision | Refused:
        """What carrying `command` out means, or why it can't be."""
        match command:
            case PlaceModel():
                return self._decide_placement(command, context)
            case DeleteInstance():
                return self._decide_deletion(command)
            case AddKey():
                return self._decide_addition(command)
            case RevokeKey():
                return self._decide_revocation(command)

    def apply(self, events: tuple[Written, ...]) -> dict[str, Entry]:
        """Writes what was decided, newer than anything here. Returns the entries for the other nodes."""
        counter = self._counter()
        written: dict[str, Entry] = {}
        for number, event in enumerate(events, start=counter + 1):
            written[event.key] = Entry(event.value, Version(number, self.node_id))
        self.merge(written)
        return written

    def merge(self, entries: Mapping[str, Entry]) -> bool:
        """Takes in what is newer. True if anything was."""
        highest = self._counter() + COUNTER_LEAP_MAX
        newer = {
            key: entry
            for key, entry in entries.items()
            if entry.version.counter <= highest and is_newer(entry, self.entries.get(key))
        }
        if newer:
            self.entries = _bounded(dict(sorted({**self.entries, **newer}.items())))
            self._index()
        return bool(newer)

    def _counter(self) -> int:
        return max((entry.version.counter for entry in self.entries.values()), default=0)

    def _index(self) -> None:
        self.revision += 1
        values = [entry.value for entry in self.entries.values()]
        self.wishes = {value.wish_id: value for value in values if isinstance(value, Wish)}
        self.instances = {value.instance_id: value for value in values if isinstance(value, Instance)}
        self.keys = {value.key_id: value for value in values if isinstance(value, ApiKey)}
        self.digest = digest(self.entries)

    def _decide_placement(self, command: PlaceModel, context: Context) -> Decision | Refused:
        wish_id = context.command_id
        done = self._done_before(wish_id)
        if done:
            return Decision((), Accepted(done))
        options = Options(
            node_count_min=command.node_count_min,
            context_length=command.context_length,
            slot_count=command.slot_count,
            node_ids=command.node_ids,
            asked_at=context.asked_at,
        )
        placement = place(command.card, context.nodes, options)
        if isinstance(placement, Refused):
            return placement
        wish = Wish(
            wish_id=wish_id,
            card=command.card,
            node_count_min=command.node_count_min,
            context_length=placement.context_length,
            slot_count=placement.slot_count,
            node_ids=command.node_ids,
        )
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
        if INSTANCE + command.instance_id not in self.entries:
            return Refused(f"there is no instance {command.instance_id}: `covey ps` lists those there are.", NOT_FOUND)
        return Decision(self.without_wish(wish_of(command.instance_id)), Accepted(command.instance_id))

    def _decide_addition(self, command: AddKey) -> Decision | Refused:
        """A key that was added before, even if it was revoked since, is not added again."""
        key = command.key
        if KEY + key.key_id in self.entries:
            return Decision((), Accepted(key.key_id))
        refused = keys.addition_refused(key, self.keys.values())
        return refused or Decision((Written(KEY + key.key_id, key),), Accepted(key.key_id))

    def _decide_revocation(self, command: RevokeKey) -> Decision | Refused:
        if KEY + command.key in self.entries and command.key not in self.keys:
            return Decision((), Accepted(command.key))  # revoked before: that is success
        found = keys.find(command.key, self.keys.values())
        if isinstance(found, Refused):
            return found
        return Decision((Written(KEY + found.key_id, None),), Accepted(found.key_id))

    def without_wish(self, wish_id: str) -> tuple[Written, ...]:
        """Deletes a wish and all that was assigned for it."""
        ids = [instance_id for instance_id, instance in self.instances.items() if instance.wish_id == wish_id]
        gone = [Written(INSTANCE + instance_id, None) for instance_id in ids]
        return (*([Written(WISH + wish_id, None)] if wish_id in self.wishes else []), *gone)


def assignment(wish: Wish, placement: Placement, context: Context) -> Instance:
    """The instance that serves `wish` as placed, under a fresh id."""
    instance_id = InstanceId(f"{wish.wish_id}.{context.instance_mark}")
    names = {node.node_id: node.name for node in context.nodes}
    stages = tuple(
        Stage(RunnerId(f"{instance_id}.{index}"), part.node_id, part.shard, part.memory_bytes, names[part.node_id])
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
    )


def wish_of(instance_id: InstanceId) -> str:
    """The id of the wish that an instance was assigned for (marks hold no dot)."""
    return instance_id.rpartition(".")[0]


def is_newer(entry: Entry, known: Entry | None) -> bool:
    """Whether `entry` replaces `known`.

    A node that lost its memory may use a version twice; then the encoding decides, the same everywhere.
    """
    if known is None or entry.version != known.version:
        return known is None or entry.version > known.version
    return entry != known and _encoder.encode(entry) > _encoder.encode(known)


def digest(entries: Mapping[str, Entry]) -> str:
    """The same text for the same map, on every node."""
    return blake2b(_encoder.encode(sorted(entries.items())), digest_size=16).hexdigest()


def _bounded(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Without the oldest tombstones beyond the limit; every node that holds the same map drops the same ones."""
    tombstones = [(entry.version, key) for key, entry in entries.items() if entry.value is None]
    for _, key in sorted(tombstones)[: max(0, len(tombstones) - TOMBSTONES_MAX)]:
        del entries[key]
    return entries
