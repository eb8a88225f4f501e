"""Nodes that placement may choose from, each on a machine of its own unless one is named."""

from covey.control.placement.nodes import Candidate
from covey.schema.ids import NodeId

GB = 10**9


def node(name: str, free: int = 100 * GB, machine: str | None = None) -> Candidate:
    return Candidate(
        node_id=NodeId(name),
        name=name,
        machine_id=machine or f"machine-{name}",
        memory_bytes_total=2 * free,
        memory_bytes_free=free,
    )


def nodes(names: str, free: int = 100 * GB) -> list[Candidate]:
    return [node(name, free) for name in names]
