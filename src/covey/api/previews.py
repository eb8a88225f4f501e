"""exo's routes that tell beforehand what a placement would be: parse what is asked, render what would come. Pure.

A row of the previews is a way to split the model and a number of nodes. exo's clients ask for rows over RDMA too, which
we don't have: these say so.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
from pydantic import Field

from covey.api import cluster_objects as objects
from covey.api.body import DialectBody, fields
from covey.api.case import camel_case
from covey.api.cluster_commands import PlaceBody
from covey.api.errors import RequestError, sentence
from covey.schema.cluster import NODES_MAX, RANKS_MAX, Instance, PlaceModel, Refused
from covey.schema.ids import NodeId
from covey.schema.model import KvCacheType, ModelCard

SHARDINGS: Final = ("Pipeline", "Tensor")
RING, RDMA = "MlxRing", "MlxJaccl"
NO_RDMA: Final = "Covey links nodes over TLS alone, not over RDMA: choose MlxRing."
PREVIEWS_NODES_MAX: Final = 16  # of which placements are tried: each takes a while, and a home has fewer


class Row(msgspec.Struct, frozen=True):
    """A placement that could be asked for, or why it can't be."""

    sharding: str
    instance_meta: str
    placed: Instance | Refused


class PlacementQuery(DialectBody):
    """exo's parameters of `GET /instance/placement`, then ours."""

    model_id: str = Field(min_length=1)
    sharding: Literal["Pipeline", "Tensor"] = "Pipeline"
    instance_meta: Literal["MlxRing"] = "MlxRing"
    min_nodes: int = Field(default=1, ge=1, le=NODES_MAX)
    rank_count: int | None = Field(default=None, ge=1, le=RANKS_MAX)
    draft_model: str | None = Field(default=None, min_length=1)
    kv_cache: Annotated[KvCacheType, Field(strict=False)] = KvCacheType.F32

    def command(self, card: ModelCard, draft: ModelCard | None = None) -> PlaceModel:
        """`draft`: what `draft_model` names."""
        return PlaceBody(**self.model_dump()).command(card, draft)


def parse_placement(parameters: Mapping[str, str]) -> PlacementQuery:
    """Raises `RequestError`."""
    numbers = {name: _number(name, parameters[name]) for name in ("min_nodes", "rank_count") if name in parameters}
    return fields(PlacementQuery, {**parameters, **numbers})


def parse_previews(model_id: str | None) -> str:
    """Raises `RequestError`."""
    if not model_id:
        raise RequestError("The parameter 'model_id' is missing.", param="model_id")
    return model_id


def commands(card: ModelCard, node_count: int, node_ids: Sequence[str]) -> Iterator[tuple[str, PlaceModel]]:
    """What to try, with the sharding that it is: each on one node, on two, and so on."""
    for sharding in SHARDINGS:
        for count in range(1, min(node_count, PREVIEWS_NODES_MAX) + 1):
            ranks = count if sharding == "Tensor" else 1
            chosen = tuple(map(NodeId, node_ids))
            yield sharding, PlaceModel(card=card, node_count_min=count, node_ids=chosen, rank_count=ranks)


def render_placement(placed: Instance | Refused) -> dict[str, Any]:
    """Raises `RequestError` with the reason why there is none."""
    if isinstance(placed, Refused):
        raise RequestError(sentence(placed.reason))
    return objects.instance(camel_case, placed, {})


def render_previews(card: ModelCard, tried: Sequence[tuple[str, Instance | Refused]]) -> dict[str, Any]:
    """One row for each sharding and number of nodes that it works with; where it works with none, why; none without
    nodes.
    """
    rows = [
        row for sharding in SHARDINGS for row in _rows(sharding, [each for kind, each in tried if kind == sharding])
    ]
    return {"previews": [_render(card, row) for row in rows]}


def _rows(sharding: str, tried: Sequence[Instance | Refused]) -> Iterator[Row]:
    if not tried:
        return
    by_count = {len(each.stages): each for each in tried if isinstance(each, Instance)}
    refused = [each for each in tried if isinstance(each, Refused)]
    for each in by_count.values() or refused[:1]:
        yield Row(sharding, RING, each)
    yield Row(sharding, RDMA, Refused(NO_RDMA))


def _render(card: ModelCard, row: Row) -> dict[str, Any]:
    asked = {"model_id": card.model_id, "sharding": row.sharding, "instance_meta": row.instance_meta}
    placed = row.placed
    if isinstance(placed, Refused):
        return {**asked, "instance": None, "memory_delta_by_node": None, "error": sentence(placed.reason)}
    memory = {each.node_id: each.memory_bytes for each in placed.stages}
    instance = objects.instance(camel_case, placed, {})
    return {**asked, "instance": instance, "memory_delta_by_node": memory, "error": None}


def _number(name: str, text: str) -> int:
    if not text.removeprefix("-").isdecimal() or len(text) > len(str(NODES_MAX)) + 1:
        raise RequestError(f"The parameter '{name}' must be a whole number, for example 2.", param=name)
    return int(text)
