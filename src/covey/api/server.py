"""The HTTP server's routes: joins the dialects to a `Backend`. With `answers` and the other routes, this is what knows
the web framework.

Bodies are read and checked by the dialects, not by the framework, so that every error has the same envelope.
"""

import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from importlib.metadata import version
from typing import Any, Final

import anyio
import anyio.lowlevel
import msgspec
from fastapi import FastAPI, Request, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from covey.api import cluster_commands, native, openai_chat, previews, sse
from covey.api.answers import ERROR_HANDLERS, NO_STORE, RETRY_AFTER_S, BodyReader, StreamResponse, json_response, stream
from covey.api.backend import Backend
from covey.api.cluster_routes import WAIT_S_MAX, ClusterRoutes
from covey.api.code_routes import CodeRoutes
from covey.api.errors import RequestError, about_model
from covey.api.event_stream import EventStream, wait_disconnected
from covey.api.guard import Access, Guard, account_of
from covey.api.key_routes import KeyRoutes
from covey.schema.cluster import DeleteInstance, Instance, PlaceModel, Rebalance, Refused, Visibility
from covey.schema.generation import (
    GenerationEvent,
    GenerationFailed,
    GenerationFinished,
    GenerationRequest,
    PickedToken,
    TextGenerated,
    Timings,
)
from covey.schema.ids import InstanceId

WORTH_A_RETRY: Final = frozenset({429, 503})


def create_guarded_app(backend: Backend, access: Access) -> ASGIApp:
    """The node's HTTP API for whoever `access` lets in."""
    guarded = Guard(create_app(backend), access, backend.keys)
    if not access.origins:
        return guarded
    return CORSMiddleware(guarded, allow_origins=sorted(access.origins), allow_methods=["*"], allow_headers=["*"])


def create_app(backend: Backend) -> FastAPI:
    """The node's HTTP API over `backend`, for everybody."""
    app = FastAPI(
        title="Covey", version=version("covey"), docs_url=None, redoc_url=None, exception_handlers=ERROR_HANDLERS
    )
    bodies = BodyReader()
    chat, instances = ChatRoutes(backend, bodies), InstanceRoutes(backend, bodies)
    cluster, keys = ClusterRoutes(backend), KeyRoutes(backend, bodies)
    routes: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
        ("POST", "/v1/chat/completions", chat.complete),
        ("POST", "/generate", chat.generate),
        ("GET", "/health", cluster.health),
        ("GET", "/node_id", cluster.node_id),
        ("GET", "/state", cluster.state),
        ("GET", "/state/{path:path}", cluster.state),
        ("GET", "/cluster", cluster.snapshot),
        ("GET", "/cluster/stream", cluster.changes),
        ("GET", "/events", cluster.events),
        ("GET", "/models", cluster.models),
        ("GET", "/v1/models", cluster.models),
        ("GET", "/v1/models/{model_id:path}", cluster.model),
        ("POST", "/place_instance", instances.place),
        ("GET", "/instance/await", instances.wait_ready),
        ("GET", "/instance/placement", instances.placement),
        ("GET", "/instance/previews", instances.previews),
        ("GET", "/instance/{instance_id}", instances.get),
        ("DELETE", "/instance/{instance_id}", instances.delete),
        ("POST", "/instance/{instance_id}/rebalance", instances.rebalance),
        ("GET", "/keys", keys.list),
        ("POST", "/keys", keys.add),
        ("DELETE", "/keys/{key:path}", keys.revoke),
        ("POST", "/join_code/rotate", CodeRoutes(backend, bodies).rotate),
    ]
    for method, path, endpoint in routes:
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    return app


# ---- text ----


class Collected(msgspec.Struct):
    """An answer that is not streamed; `end` stays None if the client went away."""

    text: str = ""
    picked: list[PickedToken] = []
    end: GenerationFinished | GenerationFailed | None = None


class ChatRoutes:
    def __init__(self, backend: Backend, bodies: BodyReader) -> None:
        self._backend = backend
        self._bodies = bodies

    async def complete(self, request: Request) -> Response:
        """OpenAI's chat completions, streamed or not."""
        call = openai_chat.parse(await self._bodies.read(request))
        events = await self._begin(request, call.request)
        answer = openai_chat.Answer(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), call.request.model_id)
        if call.stream:
            renderer = openai_chat.StreamRenderer(answer, include_usage=call.include_usage)
            return StreamResponse(EventStream(events, renderer.render, refusal))
        collected = await collect(request, events)
        if collected.end is None:
            raise ClientDisconnect
        if isinstance(collected.end, GenerationFailed):
            raise as_error(collected.end)
        wants_logprobs = call.request.sampling.top_logprobs is not None
        picked = collected.picked if wants_logprobs else None
        body = openai_chat.render_answer(answer, collected.text, collected.end, picked)
        return json_response(body, headers={"Server-Timing": server_timing(collected.end.timings)})

    async def generate(self, request: Request) -> Response:
        """Covey's own: every `GenerationEvent`, with token ids."""
        events = await self._begin(request, native.parse_generate(await self._bodies.read(request)))
        return StreamResponse(
            EventStream(events, lambda event: [native.render_event(event)], refusal, native.render_failure)
        )

    async def _begin(self, request: Request, asked: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Resolves the model's name, unless an instance has it: its file may be known elsewhere only."""
        placed = {instance.card.model_id for instance in self._backend.state().instances}
        if asked.model_id not in placed:
            try:
                card = await self._backend.resolve_model(asked.model_id)
            except RequestError as error:
                raise about_model(error) from None
            asked = msgspec.structs.replace(asked, model_id=card.model_id)
        asked = msgspec.structs.replace(asked, account=account_of(request.scope))
        return complete(self._backend.generate(asked))


async def complete(events: AsyncGenerator[GenerationEvent, None]) -> AsyncGenerator[GenerationEvent, None]:
    """`events`, and a failure if they end without saying how: a cut answer must not look whole."""
    async with aclosing(events):
        async for event in events:
            yield event
            if isinstance(event, GenerationFinished | GenerationFailed):
                return
    yield GenerationFailed("The answer broke off on this node; its log says why.")


def refusal(event: GenerationEvent) -> RequestError | None:
    return as_error(event) if isinstance(event, GenerationFailed) else None


def as_error(failed: GenerationFailed) -> RequestError:
    retry_after_s = failed.retry_after_s or (RETRY_AFTER_S if failed.status in WORTH_A_RETRY else None)
    error = RequestError(failed.message, status=failed.status, param=failed.param, retry_after_s=retry_after_s)
    return about_model(error)


def server_timing(timings: Timings) -> str:
    """The standard header for what took how long, in milliseconds; browsers show it."""
    spans = {"queue": timings.queued_ms, "prefill": timings.prefill_ms, "decode": timings.decode_ms}
    return ", ".join(f"{name};dur={value:.1f}" for name, value in spans.items())


async def collect(request: Request, events: AsyncGenerator[GenerationEvent, None]) -> Collected:
    """All of `events`, or what came until the client went away."""
    collected = Collected()

    async def end_with_client(scope: anyio.CancelScope) -> None:
        await wait_disconnected(request.receive)
        scope.cancel()

    async with anyio.create_task_group() as group, aclosing(events):
        group.start_soon(end_with_client, group.cancel_scope)
        async for event in events:
            if isinstance(event, TextGenerated):
                collected.text += event.text
                collected.picked += event.picked
            elif isinstance(event, GenerationFinished | GenerationFailed):
                collected.end = event
        group.cancel_scope.cancel()
    return collected


# ---- instances ----


class InstanceRoutes:
    def __init__(self, backend: Backend, bodies: BodyReader) -> None:
        self._backend = backend
        self._bodies = bodies

    async def place(self, request: Request) -> Response:
        """Places a model; answers when the leader has decided, with the id of the instance."""
        asked = cluster_commands.parse_place(await self._bodies.read(request))
        command = await self._command(asked)
        result = await self._backend.submit(command)
        decided = cluster_commands.accepted(result.outcome)
        return json_response(cluster_commands.render_placed(result.command_id, command.card, decided))

    async def placement(self, request: Request) -> Response:
        """The instance that a placement would make; nothing is placed."""
        asked = previews.parse_placement(request.query_params)
        placed = self._backend.preview(await self._command(asked))
        return json_response(previews.render_placement(placed), headers=NO_STORE)

    async def _command(self, asked: cluster_commands.PlaceBody | previews.PlacementQuery) -> PlaceModel:
        """With the models that are named. Raises `RequestError`."""
        card = await self._backend.resolve_model(asked.model_id)
        draft = await self._backend.resolve_model(asked.draft_model) if asked.draft_model else None
        return asked.command(card, draft)

    async def previews(self, request: Request) -> Response:
        """What a model could be placed as: for each way to split it and each number of nodes, or why not."""
        card = await self._backend.resolve_model(previews.parse_previews(request.query_params.get("model_id")))
        chosen = request.query_params.getlist("node_ids")
        members = [each for each in self._backend.state().members if each.visibility is Visibility.VISIBLE]
        commands = previews.commands(card, len(chosen) or len(members), chosen)
        tried: list[tuple[str, Instance | Refused]] = []
        for sharding, command in commands:
            tried.append((sharding, self._backend.preview(command)))
            await anyio.lowlevel.checkpoint()  # a placement takes a while, and others are served here
        return json_response(previews.render_previews(card, tried), headers=NO_STORE)

    async def get(self, request: Request) -> Response:
        """One instance."""
        state = self._backend.state()
        instance = cluster_commands.instance_with(state, request.path_params["instance_id"])
        return json_response(cluster_commands.render_instance(state, instance), headers=NO_STORE)

    async def delete(self, request: Request) -> Response:
        """Stops an instance; its runners end."""
        result = await self._backend.submit(DeleteInstance(InstanceId(request.path_params["instance_id"])))
        decided = cluster_commands.accepted(result.outcome)
        return json_response(cluster_commands.render_decided(result.command_id, decided))

    async def rebalance(self, request: Request) -> Response:
        """Places an instance as it would be placed now; what it has loaded already stays where it can."""
        result = await self._backend.submit(Rebalance(InstanceId(request.path_params["instance_id"])))
        decided = cluster_commands.accepted(result.outcome)
        return json_response(cluster_commands.render_decided(result.command_id, decided))

    async def wait_ready(self, request: Request) -> Response:
        """Streams one event: when an instance of the model can answer, or none ever will, or the time is over."""
        parameters = request.query_params
        query = cluster_commands.parse_await(parameters.get("model_id"), parameters.get("timeout_seconds"))
        return stream(self._ready(query), lambda event: [sse.data(event)])

    async def _ready(self, query: cluster_commands.AwaitQuery) -> AsyncGenerator[dict[str, Any], None]:
        deadline = anyio.current_time() + query.timeout_s if query.timeout_s else float("inf")
        while True:
            state = self._backend.state()
            placed = [each for each in state.instances if each.card.model_id == query.model_id]
            awaited = [(each, self._backend.instance_status(each)) for each in placed]
            end = cluster_commands.render_awaited(state, awaited)
            left = deadline - anyio.current_time()
            if end or left <= 0:
                yield end or cluster_commands.render_timeout(awaited, query)
                return
            await self._backend.wait_changed(state.revision, min(left, WAIT_S_MAX))
