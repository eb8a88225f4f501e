"""What placing a model would bring, as a snapshot has it, without asking the leader: nothing is written or promised."""

from typing import Final

from covey.control.cluster import Context, assignment, options_asked_for, wish_asked_for
from covey.control.placement.place import place
from covey.control.routing import nodes_of
from covey.schema.cluster import ClusterState, Instance, PlaceModel, Refused

NAME: Final = "preview"  # of the instance that would be


def preview(state: ClusterState, command: PlaceModel, engine: str) -> Instance | Refused:
    """The instance that `command` would make if it were given at the node whose snapshot this is, or why none."""
    nodes = nodes_of(state)
    placement = place(command.card, nodes, options_asked_for(command, state.node_id))
    if isinstance(placement, Refused):
        return placement
    context = Context(command_id=NAME, asked_at=state.node_id, instance_mark="0", engine=engine, nodes=nodes)
    return assignment(wish_asked_for(command, placement, NAME), placement, context)
