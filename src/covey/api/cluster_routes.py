"""The routes that show the cluster: in exo's shape, in ours, as a stream of changes, and what happened, in words."""

import time
import uuid
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Final

import anyio
from fastapi import Request, Response

from covey.api import activity, cluster_state, models, native
from covey.api.answers import NO_STORE, json_response, revalidated, stream
from covey.api.backend import Backend
from covey.api.cluster_changes import ClusterChange, ClusterFeed, without_ages
from covey.schema.cluster import ClusterState

WAIT_S_MAX: Final = 60.0  # one wait for a change; then we look again whether somebody still listens
SPACING_S: Final = 0.1  # between two changes for one client: a download reports often
TIMELESS: Final = frozenset({"lastSeen", "lastEventAppliedIdx"})  # time moves the one, what no client sees the other


class ClusterRoutes:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._created_s = int(time.time())
        self._life = uuid.uuid4().hex[:8]
        self._feed = ClusterFeed(self._life)

    async def health(self, _: Request) -> Response:
        """Answers as long as this node serves requests."""
        return json_response({"status": "ok", "node_id": self._backend.node_id, "version": version("covey")})

    async def node_id(self, _: Request) -> Response:
        """The id of this node."""
        return json_response(self._backend.node_id)

    async def state(self, request: Request) -> Response:
        """The state in exo's shape, or the part of it at a path. Unchanged: 304 for the ETag that it had."""
        cards = {model.card.model_id: model.card for model in self._backend.models()}
        rendered = cluster_state.render_state(self._backend.state(), cards, datetime.now(UTC))
        path = request.path_params.get("path", "")
        value = cluster_state.part_of(rendered, path)
        stable = value if path else {name: part for name, part in value.items() if name not in TIMELESS}
        return revalidated(request, value, stable)

    async def snapshot(self, request: Request) -> Response:
        """The `ClusterState`, as Covey's own clients read it."""
        state = self._backend.state()
        return revalidated(request, state, without_ages(state))

    async def changes(self, request: Request) -> Response:
        """The `ClusterState`, then its changes, as an event stream; goes on after Last-Event-ID, if it can."""
        return stream(self._changes(request.headers.get("last-event-id")), lambda event: [native.render_change(*event)])

    async def _changes(self, last_id: str | None) -> AsyncGenerator[tuple[str, ClusterState | ClusterChange], None]:
        while True:
            state = self._backend.state()
            self._feed.see(state)
            lacking = self._feed.since(last_id)
            last_id = self._feed.last_id
            if lacking is not None:
                yield last_id, lacking
                await anyio.sleep(SPACING_S)
            await self._backend.wait_changed(state.revision, WAIT_S_MAX)

    async def events(self, request: Request) -> Response:
        """What happened lately, in words, from a cursor on."""
        query = activity.parse_events(request.query_params, self._life)
        page = self._backend.activity(query.after, query.limit)
        return json_response(activity.render_page(page, query, self._life), headers=NO_STORE)

    async def models(self, request: Request) -> Response:
        """The models that can be named here; `status=downloaded` keeps those on this node's disk."""
        status = request.query_params.get("status")
        placed = self._backend.state().instances
        return json_response(models.render_models(self._backend.models(), placed, self._created_s, status))

    async def model(self, request: Request) -> Response:
        """One of them. Its id may have slashes, written as they are or as %2F."""
        found = models.find_model(self._backend.models(), request.path_params["model_id"])
        return json_response(models.render_model(found, self._backend.state().instances, self._created_s))
