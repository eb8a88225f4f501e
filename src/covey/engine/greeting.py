"""The first words on a connection between two runners of an instance: who dials says what it is and wants, and is
answered `LinkWelcome` or `LinkRefused`. And whom a runner says them to.

A stage is linked to the one after it by rank 0 of each. The ranks of a stage share its layers: rank 0 has a link to
each other rank, by which that learns what is to be computed (`Purpose.STEPS`), and each two of them have a connection
for what they tell one another while they compute (`Purpose.SUMS`). A stage dials the one after it, and a rank those
above it; who can't be reached dials in the other direction, and offers the same.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from msgspec import Struct

from covey.schema.ids import NodeId
from covey.schema.runner import Address, RunnerSpec


class LinkHello(Struct, frozen=True, tag=True):
    """Who opens a link: its own stage, and whose it is."""

    instance_id: str
    generation: int
    stage_index: int
    stage_count: int


class LinkOffer(Struct, frozen=True, tag=True):
    """The same of a stage that wants the link from the one before, which may not be able to reach it."""

    instance_id: str
    generation: int
    stage_index: int
    stage_count: int


class Purpose(StrEnum):
    """What a connection between two ranks of a stage is for."""

    STEPS = "steps"
    SUMS = "sums"


class RankHello(Struct, frozen=True, tag=True):
    """A rank, to one above it."""

    instance_id: str
    generation: int
    stage_index: int
    rank: int
    rank_count: int
    purpose: Purpose


class RankOffer(Struct, frozen=True, tag=True):
    """The same of a rank that wants the connection from one below it, which may not be able to reach it."""

    instance_id: str
    generation: int
    stage_index: int
    rank: int
    rank_count: int
    purpose: Purpose


Greeting = LinkHello | LinkOffer | RankHello | RankOffer


class LinkWelcome(Struct, frozen=True, tag=True):
    pass


class LinkRefused(Struct, frozen=True, tag=True):
    reason: str


# ---- who is let in ----


def refusal(spec: RunnerSpec, first: Greeting, peer: NodeId) -> str | None:
    """Why the runner of `spec` wants no connection with node `peer`, which says `first`."""
    if first.instance_id != spec.instance_id:
        return f"this stage belongs to instance {spec.instance_id}, not {first.instance_id}."
    if isinstance(first, LinkHello | LinkOffer):
        return _stage_refusal(spec, first, peer)
    return _rank_refusal(spec, first, peer)


def _stage_refusal(spec: RunnerSpec, first: LinkHello | LinkOffer, peer: NodeId) -> str | None:
    if spec.rank:
        return f"rank {spec.rank} of stage {spec.stage_index} is linked to its own stage alone."
    if spec.stage_count == 1:
        return "this stage is the only one."
    step, goes = (-1, "follows") if isinstance(first, LinkHello) else (1, "comes before")
    expected = (spec.stage_index + step) % spec.stage_count
    if (first.stage_index, first.stage_count) != (expected, spec.stage_count):
        return (
            f"stage {spec.stage_index} of {spec.stage_count} {goes} stage {expected},"
            f" not stage {first.stage_index} of {first.stage_count}."
        )
    if peer != spec.stage_node_ids[expected]:
        return f"stage {expected} belongs to node {spec.stage_node_ids[expected][:8]}, not to node {peer[:8]}."
    return None


def _rank_refusal(spec: RunnerSpec, first: RankHello | RankOffer, peer: NodeId) -> str | None:
    own = f"rank {spec.rank} of {spec.rank_count} of stage {spec.stage_index}"
    if (first.stage_index, first.rank_count) != (spec.stage_index, spec.rank_count):
        return f"this is {own}, which shares nothing with a rank of {first.rank_count} of stage {first.stage_index}."
    dialler, other = (first.rank, spec.rank) if isinstance(first, RankHello) else (spec.rank, first.rank)
    lowest = 0 if first.purpose is Purpose.STEPS else dialler
    if not 0 <= dialler < other < spec.rank_count or dialler != lowest:
        return f"{own} takes no connection for {first.purpose} from rank {first.rank}."
    if peer != spec.rank_node_ids[first.rank]:
        return f"rank {first.rank} belongs to node {spec.rank_node_ids[first.rank][:8]}, not to node {peer[:8]}."
    return None


# ---- to whom they are said ----


class Neighbour(Struct, frozen=True):
    """Another runner of the instance. `addresses` are in the order to be tried."""

    name: str
    node_id: NodeId
    first: Greeting  # what it is told
    addresses: tuple[Address, ...]


def stage_after(spec: RunnerSpec, addresses: Sequence[Address]) -> Neighbour:
    """To open the link to it."""
    return _stage(spec, (spec.stage_index + 1) % spec.stage_count, LinkHello, addresses)


def stage_before(spec: RunnerSpec, addresses: Sequence[Address]) -> Neighbour:
    """To offer it the link from it."""
    return _stage(spec, (spec.stage_index - 1) % spec.stage_count, LinkOffer, addresses)


def other_rank(spec: RunnerSpec, rank: int, purpose: Purpose, addresses: Sequence[Address]) -> Neighbour:
    """To open a connection to a rank above, or to offer one to a rank below."""
    kind = RankHello if rank > spec.rank else RankOffer
    first = kind(spec.instance_id, spec.generation, spec.stage_index, spec.rank, spec.rank_count, purpose)
    name = f"rank {rank} of stage {spec.stage_index}"
    return _neighbour(name, spec.rank_node_ids[rank], first, addresses)


def _stage(spec: RunnerSpec, index: int, kind: type[Any], addresses: Sequence[Address]) -> Neighbour:
    first = kind(spec.instance_id, spec.generation, spec.stage_index, spec.stage_count)
    return _neighbour(f"stage {index}", spec.stage_node_ids[index], first, addresses)


def _neighbour(name: str, node_id: NodeId, first: Greeting, addresses: Sequence[Address]) -> Neighbour:
    places = ", ".join(f"{address.host}:{address.port}" for address in addresses) or "no address"
    return Neighbour(f"{name} at {places}", node_id, first, tuple(addresses))


def name_of(first: Greeting) -> str:
    """Whoever says `first`."""
    rank = f"rank {first.rank} of " if isinstance(first, RankHello | RankOffer) else ""
    return f"{rank}stage {first.stage_index}"
