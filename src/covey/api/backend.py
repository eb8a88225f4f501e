"""What the HTTP API needs from a node. `node.py` joins the effects and `serving` into it; tests bring a fake.

The API decides nothing about a cluster: it reads snapshots, passes commands on, and renders what comes back.
"""

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from msgspec import Struct

from covey.schema.activity import ActivityPage
from covey.schema.cluster import (
    ApiKey,
    ClusterState,
    Command,
    CommandResult,
    Instance,
    InstanceStatus,
    PlaceModel,
    Refused,
)
from covey.schema.generation import GenerationEvent, GenerationRequest
from covey.schema.ids import NodeId
from covey.schema.model import ModelCard
from covey.schema.trust import RotationOutcome


class ListedModel(Struct, frozen=True):
    """A model that this node can name, and whether its file lies complete on this node's disk."""

    card: ModelCard
    on_disk: bool


class Backend(Protocol):
    """One node, as its HTTP clients see it. Everything runs on the event loop of the server."""

    @property
    def node_id(self) -> NodeId: ...

    def state(self) -> ClusterState:
        """The latest snapshot. Cheap: called for every request."""
        ...

    def instance_status(self, instance: Instance) -> InstanceStatus:
        """How far an instance of the latest snapshot has come."""
        ...

    def keys(self) -> Sequence[ApiKey]:
        """The API keys that are valid now. Cheap: called for every request that shows one."""
        ...

    def activity(self, after: int, limit: int) -> ActivityPage:
        """The oldest events with a number above `after` that are still kept, at most `limit`."""
        ...

    async def wait_changed(self, revision: int, timeout_s: float) -> None:
        """Returns when `state().revision` differs from `revision`, at the latest after `timeout_s`."""
        ...

    async def resolve_model(self, name: str) -> ModelCard:
        """The card of a listed name, a path to a GGUF file, or `hf:OWNER/REPO/FILE`.

        May read a file's header or ask a hub. Raises `RequestError`: 404 for an unknown name (its message lists the
        known ones), 400 for a file that is not a model we can run, 502 or 503 for a hub that can't be reached.
        """
        ...

    def models(self) -> Sequence[ListedModel]:
        """The models listed here: the catalogue's and those placed or on disk, in a stable order."""
        ...

    def preview(self, command: PlaceModel) -> Instance | Refused:
        """What `command` would bring now, as far as this node sees it."""
        ...

    async def submit(self, command: Command) -> CommandResult:
        """To the leader and back. Never raises for the cluster's sake: no leader is `TimedOut`."""
        ...

    async def rotate_code(self, proof: str, without: Sequence[NodeId]) -> RotationOutcome:
        """Makes a new join code and gives it to the nodes that are here, but those `without`.

        `proof`: that whoever asks holds the present one. Raises `RequestError`: 403 without, 409 in an open cluster.
        """
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """The answer, event by event; the last is `GenerationFinished` or `GenerationFailed`.

        What is refused (not placed, template, context length) is a `GenerationFailed` with its status, and the only
        event. Closing the generator, or cancelling the task that iterates it, cancels the request at the head.
        """
        ...
