"""Which of the assignments in the map count here and now.

When a node that holds a part of an instance is gone, its wish is assigned anew; but the old assignment stays in the map
for it may be running on the other side of a cut, and a deletion would end it there as soon as the two sides meet. Here
it is dormant: it has no runner, takes no memory, and is not shown. When its nodes are back, the leader keeps one.
"""

from collections.abc import Collection, Iterable, Mapping
from itertools import groupby

from covey.control.routing import Reports, is_ready
from covey.schema.cluster import Instance
from covey.schema.ids import InstanceId, NodeId


def active(
    instances: Mapping[InstanceId, Instance], gone: Collection[NodeId], reports: Reports
) -> dict[InstanceId, Instance]:
    """Without the dormant ones, by id. Each wish that has an assignment keeps at least one."""
    by_wish = sorted(instances.values(), key=lambda each: (each.wish_id, each.instance_id))
    counted = [
        each for _, same in groupby(by_wish, lambda each: each.wish_id) for each in _awake([*same], gone, reports)
    ]
    return {each.instance_id: each for each in sorted(counted, key=lambda each: each.instance_id)}


def _awake(same: list[Instance], gone: Collection[NodeId], reports: Reports) -> list[Instance]:
    """Those whose nodes are all here; the ready ones if there are any. With none the one that lacks least waits."""
    if len(same) == 1:
        return same
    whole = [each for each in same if not lacks(each, gone)]
    if not whole:
        return [min(same, key=lambda each: (lacks(each, gone), each.instance_id))]
    return [each for each in whole if is_ready(each, reports)] or whole


def lacks(instance: Instance, gone: Collection[NodeId]) -> int:
    """How many of its stages are on nodes that are gone."""
    return sum(stage.node_id in gone for stage in instance.stages)


def assigned_nodes(instances: Iterable[Instance]) -> list[NodeId]:
    """The nodes that hold a stage of any."""
    return sorted({stage.node_id for each in instances for stage in each.stages})
