"""exo's routes that place, await and delete an instance: parse what is asked, render what was decided. Pure."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec import Struct
from pydantic import Field

from covey.api import cluster_objects as objects
from covey.api.body import DialectBody, fields, json_object
from covey.api.case import camel_case, snake_case
from covey.api.errors import RequestError, sentence
from covey.schema.cluster import (
    NODES_MAX,
    RANKS_MAX,
    SLOTS_MAX,
    TOKENS_MAX,
    Accepted,
    ClusterState,
    CommandOutcome,
    Instance,
    InstancePhase,
    InstanceStatus,
    PlaceModel,
    Refused,
    TimedOut,
)
from covey.schema.ids import NodeId
from covey.schema.model import KvCacheType, ModelCard, Quantizing

AWAIT_S_MAX = 300
RECEIVED = "Command received."

Awaited = Sequence[tuple[Instance, InstanceStatus]]  # the instances of a model, and how far each has come


class PlaceBody(DialectBody):
    """exo's fields, then ours."""

    model_id: str = Field(min_length=1)
    sharding: Literal["Pipeline", "Tensor"] = "Pipeline"
    instance_meta: Literal["MlxRing"] = "MlxRing"
    min_nodes: int = Field(default=1, ge=1, le=NODES_MAX)
    context_length: int | None = Field(default=None, ge=2, le=TOKENS_MAX)
    slot_count: int | None = Field(default=None, ge=1, le=SLOTS_MAX)
    node_ids: list[str] = Field(default_factory=list)
    exact: bool = False
    quantize: Annotated[Quantizing | None, Field(strict=False)] = None  # in JSON it is its text
    rank_count: int | None = Field(default=None, ge=1, le=RANKS_MAX)  # how many nodes are to share each layer
    draft_model: str | None = Field(default=None, min_length=1)  # named as a model is; it guesses what comes next
    kv_cache: Annotated[KvCacheType, Field(strict=False)] = KvCacheType.F32

    def command(self, card: ModelCard, draft: ModelCard | None = None) -> PlaceModel:
        """`draft`: what `draft_model` names."""
        return PlaceModel(
            card=card,
            node_count_min=self.min_nodes,
            context_length=self.context_length,
            slot_count=self.slot_count,
            node_ids=tuple(NodeId(node_id) for node_id in self.node_ids),
            exact=self.exact,
            quantize=self.quantize,
            rank_count=self._rank_count(),
            draft=draft,
            kv_cache=self.kv_cache,
        )

    def _rank_count(self) -> int:
        """Exo's "Tensor" is one stage, which all its nodes share."""
        if self.rank_count is not None:
            return self.rank_count
        return self.min_nodes if self.sharding == "Tensor" else 1


def parse_place(body: bytes) -> PlaceBody:
    """Raises `RequestError`."""
    return fields(PlaceBody, json_object(body))


class AwaitQuery(Struct, frozen=True):
    """What `GET /instance/await` waits for; `timeout_s` None is for ever."""

    model_id: str
    timeout_s: float | None


def parse_await(model_id: str | None, timeout_seconds: str | None) -> AwaitQuery:
    """Raises `RequestError`. exo's 0 is "for ever"."""
    if not model_id:
        raise RequestError("The parameter 'model_id' is missing.", param="model_id")
    try:
        seconds = float(timeout_seconds or 0)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= AWAIT_S_MAX:
        raise RequestError(
            f"The parameter 'timeout_seconds' must be a number from 0 to {AWAIT_S_MAX}.", param="timeout_seconds"
        )
    return AwaitQuery(model_id, seconds or None)


def accepted(outcome: CommandOutcome) -> Accepted:
    """What the leader decided. Raises `RequestError` with the leader's reason, or 504."""
    match outcome:
        case Accepted():
            return outcome
        case Refused():
            raise RequestError(sentence(outcome.reason), status=outcome.status)
        case TimedOut():
            raise RequestError(
                f"No leader answered within {outcome.waited_ms / 1000:.0f} s; it is not known whether the command was"
                " carried out. Look at GET /cluster and try again.",
                status=504,
                retry_after_s=5,
            )


def render_placed(command_id: str, card: ModelCard, decided: Accepted) -> dict[str, Any]:
    """What exo answers, the id that its clients have to find out by comparing states, and how safe the wish is."""
    return {
        "message": RECEIVED,
        "command_id": command_id,
        "model_card": objects.model_card(camel_case, card),
        "instance_id": decided.effect_id,
        "on_one_node_only": decided.on_one_node_only,
    }


def render_decided(command_id: str, decided: Accepted) -> dict[str, Any]:
    return {
        "message": RECEIVED,
        "command_id": command_id,
        "instance_id": decided.effect_id,
        "on_one_node_only": decided.on_one_node_only,
    }


def instance_with(state: ClusterState, instance_id: str) -> Instance:
    """Raises `RequestError` 404."""
    for instance in state.instances:
        if instance.instance_id == instance_id:
            return instance
    known = ", ".join(item.instance_id for item in state.instances) or "none"
    raise RequestError(f"There is no instance '{instance_id}'; there are: {known}.", status=404)


def render_instance(state: ClusterState, instance: Instance) -> dict[str, Any]:
    return objects.instance(camel_case, instance, objects.runner_reports(state))


def render_awaited(state: ClusterState, placed: Awaited) -> dict[str, Any] | None:
    """The event "ready" once an instance can answer (exo speaks snake_case here), "failed" once none ever will."""
    for instance, status in placed:
        if status.phase is InstancePhase.READY:
            return {"type": "ready", "instance": objects.instance(snake_case, instance, objects.runner_reports(state))}
    if placed and all(status.phase is InstancePhase.FAILED for _, status in placed):
        return {"type": "failed", "message": placed[0][1].explanation}
    return None


def render_timeout(placed: Awaited, query: AwaitQuery) -> dict[str, Any]:
    reason = placed[0][1].text if placed else "it is not placed"
    return {"type": "timeout", "message": f"{query.model_id} was not ready within {query.timeout_s:g} s: {reason}."}
