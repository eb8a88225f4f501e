"""What the leader mends without being asked: each wish has one instance, on nodes that are there.

Where an instance has a stage on a node that is gone, the wish is placed again on what is left, so that as few layers
move as possible, and the old assignment stays dormant (`dormancy`); if the wish does not fit it is tried again whenever
the nodes' figures change. A stage whose node has had too little memory for a while, or can't end its former process, is
mended alike, but until there is another place its instance goes on waiting. Of several instances whose nodes are all
here (two leaders, apart for a while, each assigned the wish) one stays: a ready one if there is one, then one that
serves requests, then the one that this leader has seen whole for longest, then, as after a power cut, the latest.
"""

import sys
from collections.abc import Callable, Collection, Sequence
from typing import Final

from msgspec.structs import replace

from covey.control.cluster import (
    INSTANCE,
    WISH,
    Cluster,
    Context,
    Written,
    assignment,
    is_same,
    options_of,
    replacement,
    wish_of,
)
from covey.control.dormancy import lacks
from covey.control.placement.again import place_again, place_anew, place_at_all
from covey.control.placement.nodes import Candidate
from covey.control.placement.place import Options, Part, Placement
from covey.control.routing import (
    Reports,
    has_failed,
    is_ready,
    request_count,
    runner_report,
    waits_for_memory,
)
from covey.schema.cluster import Instance, Refused, Version, Wish
from covey.schema.ids import InstanceId, NodeId
from covey.schema.model import ModelCard
from covey.schema.pipeline import head
from covey.schema.runner import RunnerState

REST_MS: Final = 30_000  # a conversation pauses for less; and a node that comes and goes has gone again by then
DORMANT_MAX: Final = 2  # of one wish: the sides of a cut; of more those go that were assigned first

Look = Callable[[tuple[Instance, ...]], Context]  # at the nodes as they would be without these instances


class Tending:
    """Decides, one wish at a time, so that each placement sees what the one before it has promised."""

    def __init__(self, cluster: Cluster, memory_wait_ms: int) -> None:
        self.cluster = cluster
        self.memory_wait_ms = memory_wait_ms
        self.idle_since_ms: dict[InstanceId, int] = {}  # ready, and without a request
        self.rested: frozenset[InstanceId] = frozenset()  # that have been so for long enough
        self.widened_from: dict[InstanceId, Instance] = {}  # by this leader: what served before
        self.narrow: set[str] = set()  # wishes for which widening went wrong
        self.whole_since_ms: dict[InstanceId, int] = {}
        self.waiting_since_ms: dict[InstanceId, int] = {}  # for memory
        self.stuck: frozenset[InstanceId] = frozenset()  # that have waited for it for too long
        self.refused_with: dict[str, tuple[Candidate, ...]] = {}  # by wish: the nodes that could not hold it

    def look_around(self, now_ms: int, gone: Collection[NodeId], reports: Reports) -> None:
        """Notes how the instances are, once before `mend` is asked about each wish."""
        instances = self.cluster.instances.values()
        whole = [each.instance_id for each in instances if not lacks(each, gone)]
        waiting = [each.instance_id for each in instances if waits_for_memory(each, reports)]
        self.whole_since_ms = {each: self.whole_since_ms.get(each, now_ms) for each in whole}
        self.waiting_since_ms = {each: self.waiting_since_ms.get(each, now_ms) for each in waiting}
        self.stuck = frozenset(
            each for each, since_ms in self.waiting_since_ms.items() if now_ms - since_ms >= self.memory_wait_ms
        )
        idle = [each.instance_id for each in instances if is_ready(each, reports) and not request_count(each, reports)]
        self.idle_since_ms = {each: self.idle_since_ms.get(each, now_ms) for each in idle}
        self.rested = frozenset(each for each, since_ms in self.idle_since_ms.items() if now_ms - since_ms >= REST_MS)
        known = self.cluster.instances
        self.narrow &= self.cluster.wishes.keys()
        self.widened_from = {each: before for each, before in self.widened_from.items() if each in known}
        self.refused_with = {key: nodes for key, nodes in self.refused_with.items() if key in self.cluster.wishes}

    def mend(self, wish: Wish, look: Look, reports: Reports, gone: Collection[NodeId]) -> tuple[Written, ...]:
        """What to write for this wish; usually nothing. What only a newer version understands is left to its leader."""
        if any(wish_of(InstanceId(key.removeprefix(INSTANCE))) == wish.wish_id for key in self.cluster.unread):
            return ()
        mine = [each for each in self.cluster.instances.values() if each.wish_id == wish.wish_id]
        mine.sort(key=self._version, reverse=True)
        whole = sorted((each for each in mine if not lacks(each, gone)), key=lambda each: self._rank(each, reports))
        dormant = [each for each in mine if lacks(each, gone)]
        dropped = tuple(Written(INSTANCE + each.instance_id, None) for each in [*whole[1:], *dormant[DORMANT_MAX:]])
        if whole and whole[0].instance_id not in self.stuck:
            self.refused_with.pop(wish.wish_id, None)
            return dropped or self._narrow(wish, whole[0], look, reports) or self._widen(wish, whole[0], look, reports)
        replaced = self._replace(wish, look(tuple(mine)), whole[:1], dormant[:1], reports)
        return (*dropped, *replaced, *(Written(INSTANCE + each.instance_id, None) for each in whole[:1] if replaced))

    def leftovers(self) -> tuple[Written, ...]:
        """Instances whose wish was deleted, where another leader assigned it again meanwhile."""
        return tuple(
            Written(INSTANCE + instance_id, None)
            for instance_id, instance in self.cluster.instances.items()
            if not self.cluster.has(WISH + instance.wish_id)
        )

    def _rank(self, instance: Instance, reports: Reports) -> tuple[bool, bool, int]:
        """The one to keep comes first; of equal ones, that which was assigned last."""
        is_idle = request_count(instance, reports) == 0
        since_ms = self.whole_since_ms.get(instance.instance_id, sys.maxsize)
        return not is_ready(instance, reports), is_idle, since_ms

    def _version(self, instance: Instance) -> Version:
        """The later it was assigned, the higher."""
        return self.cluster.entries[INSTANCE + instance.instance_id].version

    def _replace(
        self, wish: Wish, context: Context, stuck: Sequence[Instance], lost: Sequence[Instance], reports: Reports
    ) -> tuple[Written, ...]:
        """Another assignment than those that are stuck, if there is one. What is left of a lost one stays in place."""
        if self.refused_with.get(wish.wish_id) == context.nodes:
            return ()
        options = _options_without(_hung(stuck, reports), wish, context.nodes)
        kept = None if stuck or not lost else place_again(lost[0], context.nodes, options)
        placement = kept or place_at_all(wish.card, context.nodes, options)
        instance = None if isinstance(placement, Refused) else assignment(wish, placement, context)
        if instance is None or any(is_same(each, instance) for each in stuck):
            self.refused_with[wish.wish_id] = context.nodes
            return ()
        return (Written(INSTANCE + instance.instance_id, instance),)

    def _widen(self, wish: Wish, instance: Instance, look: Look, reports: Reports) -> tuple[Written, ...]:
        """Over as many nodes and ranks as were asked for, once enough that have the file are here again and it has had
        nothing to do for a while.

        Anything else that could be better about a placement is not worth that what is loaded is read again elsewhere,
        unless a person says so.
        """
        is_wide = _is_so_wide(wish.rank_count, wish.node_count_min, instance)
        if is_wide or instance.instance_id not in self.rested or wish.wish_id in self.narrow:
            return ()
        context = look((instance,))
        having = {stage.node_id for stage in instance.stages} | _having_file(wish, reports)
        nodes = tuple(each for each in context.nodes if each.node_id in having)
        options = options_of(wish, nodes)
        if _is_so_wide(options.rank_count, options.node_count_min, instance):
            return ()
        placement = place_anew(instance, nodes, options)
        if isinstance(placement, Refused) or _is_so_wide(placement.rank_count, len(placement.parts), instance):
            return ()
        draft = placement.draft
        if draft and placement.parts[0].node_id not in _having_draft(draft, instance, reports):
            return ()
        moved = assignment(wish, placement, context)
        self.widened_from[moved.instance_id] = instance
        return replacement((instance,), moved)

    def _narrow(self, wish: Wish, instance: Instance, look: Look, reports: Reports) -> tuple[Written, ...]:
        """Back to what served before, where it was this leader that widened it, and that has failed for good."""
        before = self.widened_from.get(instance.instance_id)
        if before is None or not has_failed(instance, reports):
            return ()
        self.narrow.add(wish.wish_id)
        context = look((instance,))
        parts = tuple(Part(stage.node_id, stage.shard, stage.memory_bytes, stage.rank) for stage in before.stages)
        placement = Placement(parts, before.context_length, before.slot_count, before.rank_count, before.draft)
        if not {part.node_id for part in parts} <= {node.node_id for node in context.nodes}:
            return ()
        return replacement((instance,), assignment(wish, placement, context))


def _is_so_wide(rank_count: int, node_count: int, instance: Instance) -> bool:
    """Whether it has so many ranks and nodes, or more. Of two the one with more ranks is the wider."""
    return (instance.rank_count, len(instance.stages)) >= (rank_count, node_count)


def _having_file(wish: Wish, reports: Reports) -> set[NodeId]:
    """The nodes that need not fetch anything before they can load."""
    return {node_id for node_id, report in reports.items() if wish.card.model_id in report.models_on_disk}


def _having_draft(draft: ModelCard, instance: Instance, reports: Reports) -> set[NodeId]:
    """The nodes that could be the head without fetching the draft."""
    having = {node_id for node_id, report in reports.items() if draft.model_id in report.models_on_disk}
    return {head(instance).node_id} | having


def _hung(instances: Sequence[Instance], reports: Reports) -> set[NodeId]:
    """The nodes that can't end a process of these."""
    found = [(stage.node_id, runner_report(stage, reports)) for each in instances for stage in each.stages]
    return {node_id for node_id, report in found if report and report.state is RunnerState.STUCK}


def _options_without(hung: Collection[NodeId], wish: Wish, nodes: Sequence[Candidate]) -> Options:
    """For placing it on other nodes than those, if there are any."""
    others = [node for node in nodes if node.node_id not in hung]
    options = options_of(wish, others or nodes)
    if not hung or not others:
        return options
    return replace(options, node_ids=options.node_ids or tuple(node.node_id for node in others))
