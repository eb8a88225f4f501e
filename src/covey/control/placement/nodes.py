"""The nodes that a placement may use, and what of their machines' memory each may take.

Nodes with one `machine_id` share that machine: its free memory is counted once and divided among those that are used.
"""

from collections.abc import Collection, Sequence

from msgspec import Struct
from msgspec.structs import replace

from covey.control.placement.memory import USABLE_PERCENT
from covey.schema.ids import NodeId


class Candidate(Struct, frozen=True, kw_only=True):
    """A node that could hold a stage."""

    node_id: NodeId
    name: str
    machine_id: str
    memory_bytes_total: int
    memory_bytes_free: int  # what it says is available, in whole
    memory_bytes_promised: int = 0  # of that, what runners assigned to it will still take
    memory_bytes_held: int = 0  # by its runners that have loaded


class Machine(Struct):
    """One device, with the nodes that run on it."""

    machine_id: str
    memory_bytes_free: int
    memory_bytes_promised: int
    nodes: list[Candidate]

    @property
    def memory_bytes_usable(self) -> int:
        """What a placement may take here, in all."""
        return max(0, self.memory_bytes_free * USABLE_PERCENT // 100 - self.memory_bytes_promised)


def machines(nodes: Sequence[Candidate]) -> dict[str, Machine]:
    """By id. Of the figures that nodes on one machine report the lowest counts; promises add up.

    Each of those nodes looked at the memory at its own time, maybe before the others' runners had loaded. So no more
    counts as free there than all that they hold leaves.
    """
    found: dict[str, Machine] = {}
    for node in sorted(nodes, key=lambda node: node.node_id):
        if node.machine_id not in found:
            found[node.machine_id] = Machine(node.machine_id, node.memory_bytes_free, 0, [])
        machine = found[node.machine_id]
        machine.memory_bytes_free = min(machine.memory_bytes_free, node.memory_bytes_free)
        machine.memory_bytes_promised += node.memory_bytes_promised
        machine.nodes.append(node)
    for machine in found.values():
        if len(machine.nodes) > 1:
            machine.memory_bytes_free = min(machine.memory_bytes_free, _unheld_bytes(machine.nodes))
    return found


def among(nodes: Sequence[Candidate], node_ids: Collection[NodeId]) -> list[Candidate]:
    """Those that were chosen, all if none were. What others on their machines hold or were promised still counts."""
    chosen = {node.node_id: node for node in nodes if not node_ids or node.node_id in node_ids}
    for other in [node for node in nodes if node.node_id not in chosen]:
        sharer = next((node for node in chosen.values() if node.machine_id == other.machine_id), None)
        if sharer:
            chosen[sharer.node_id] = _with_burden(sharer, other)
    return list(chosen.values())


def ranked(nodes: Sequence[Candidate], asked_at: NodeId | None) -> list[Candidate]:
    """The nodes in order of preference: the machine with most memory first, each machine once before any twice.

    Where there is nothing to choose between, the node that asked comes first.
    """
    found = [sorted(machine.nodes, key=lambda node: node.node_id != asked_at) for machine in machines(nodes).values()]
    usable = {machine_id: machine.memory_bytes_usable for machine_id, machine in machines(nodes).items()}
    found.sort(key=lambda sharers: (-usable[sharers[0].machine_id], sharers[0].node_id != asked_at))
    order = [(place, rank, node) for rank, sharers in enumerate(found) for place, node in enumerate(sharers)]
    return [node for _, _, node in sorted(order, key=lambda each: each[:2])]


def budgets_bytes(all_nodes: Sequence[Candidate], used: Sequence[Candidate]) -> tuple[int, ...]:
    """What each of the `used` nodes may take, if these are used together."""
    by_id = machines(all_nodes)
    sharers = {machine_id: sum(node.machine_id == machine_id for node in used) for machine_id in by_id}
    return tuple(by_id[node.machine_id].memory_bytes_usable // sharers[node.machine_id] for node in used)


def _unheld_bytes(sharers: Sequence[Candidate]) -> int:
    total = max(node.memory_bytes_total for node in sharers)
    return max(0, total - sum(node.memory_bytes_held for node in sharers))


def _with_burden(node: Candidate, other: Candidate) -> Candidate:
    """`node` as if it were the `other` one of its machine, too."""
    free = min(node.memory_bytes_free, other.memory_bytes_free, _unheld_bytes((node, other)))
    return replace(
        node,
        memory_bytes_free=free,
        memory_bytes_promised=node.memory_bytes_promised + other.memory_bytes_promised,
        memory_bytes_held=node.memory_bytes_held + other.memory_bytes_held,
    )
