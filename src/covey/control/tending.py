"""What the leader mends without being asked: each wish has one instance, on nodes that are there.

An instance with a stage on a forgotten node is deleted, and the wish placed again on what is left; if it does not
fit, the wish stays and is tried whenever the nodes' figures change. Of several instances for one wish (two leaders,
apart for a while, both assigned it) one stays: a ready one if there is one, then the one with the higher id.
"""

from collections.abc import Sequence

from covey.control.cluster import INSTANCE, Cluster, Context, Written, assignment
from covey.control.placement.nodes import Candidate
from covey.control.placement.place import Options, place
from covey.control.routing import Reports, is_ready
from covey.schema.cluster import Refused, Wish
from covey.schema.ids import NodeId


class Tending:
    """Decides, one wish at a time, so that each placement sees what the one before it has promised."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.refused_with: dict[str, tuple[Candidate, ...]] = {}  # by wish: the nodes that could not hold it

    def mend(self, wish: Wish, context: Context, reports: Reports, gone: Sequence[NodeId]) -> tuple[Written, ...]:
        """What to write for this wish; usually nothing."""
        mine = [each for each in self.cluster.instances.values() if each.wish_id == wish.wish_id]
        living = [each for each in mine if not any(stage.node_id in gone for stage in each.stages)]
        living.sort(key=lambda each: (is_ready(each, reports), each.instance_id), reverse=True)
        dropped = tuple(Written(INSTANCE + each.instance_id, None) for each in mine if each not in living[:1])
        if living:
            self.refused_with.pop(wish.wish_id, None)
            return dropped
        return dropped + self._replace(wish, context)

    def leftovers(self) -> tuple[Written, ...]:
        """Instances whose wish was deleted, where another leader assigned it again meanwhile."""
        return tuple(
            Written(INSTANCE + instance_id, None)
            for instance_id, instance in self.cluster.instances.items()
            if instance.wish_id not in self.cluster.wishes
        )

    def _replace(self, wish: Wish, context: Context) -> tuple[Written, ...]:
        if self.refused_with.get(wish.wish_id) == context.nodes:
            return ()
        options = Options(
            node_count_min=wish.node_count_min, context_length=wish.context_length, slot_count=wish.slot_count
        )
        placement = place(wish.card, context.nodes, options)
        if isinstance(placement, Refused):
            self.refused_with[wish.wish_id] = context.nodes
            return ()
        instance = assignment(wish, placement, context)
        return (Written(INSTANCE + instance.instance_id, instance),)
