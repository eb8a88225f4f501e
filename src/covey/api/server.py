"""The HTTP server's routes: the one file that knows the web framework. It joins the dialects to a `Backend`.

Bodies are read and checked by the dialects, not by the framework, so that every error has the same envelope.
"""

import hashlib
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import aclosing
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Final

import anyio
import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from covey.api import cluster_commands, cluster_state, models, native, openai_chat, sse
from covey.api.backend import Backend
from covey.api.body import BODY_BYTES_MAX
from covey.api.code_routes import CodeRoutes
from covey.api.errors import RequestError, render_error
from covey.api.event_stream import Event, EventStream, wait_disconnected
from covey.schema.cluster import ClusterState, DeleteInstance
from covey.schema.generation import (
    GenerationEvent,
    GenerationFailed,
    GenerationFinished,
    GenerationRequest,
    TextGenerated,
    Timings,
)
from covey.schema.ids import InstanceId

RETRY_AFTER_S = 5  # a model that loads, or a queue that is full, may be ready by then
WORTH_A_RETRY = frozenset({429, 503})
WAIT_S_MAX = 60.0  # one wait for a change; then we look again whether somebody still listens
NO_STORE = {"Cache-Control": "no-store"}  # nobody's disk is to keep what changes every second


def create_app(backend: Backend) -> FastAPI:
    """The node's HTTP API over `backend`."""
    app = FastAPI(
        title="Covey", version=version("covey"), docs_url=None, redoc_url=None, exception_handlers=ERROR_HANDLERS
    )
    chat, cluster, instances = ChatRoutes(backend), ClusterRoutes(backend), InstanceRoutes(backend)
    routes: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
        ("POST", "/v1/chat/completions", chat.complete),
        ("POST", "/generate", chat.generate),
        ("GET", "/health", cluster.health),
        ("GET", "/node_id", cluster.node_id),
        ("GET", "/state", cluster.state),
        ("GET", "/state/{path:path}", cluster.state),
        ("GET", "/cluster", cluster.snapshot),
        ("GET", "/cluster/changes", cluster.changes),
        ("GET", "/models", cluster.models),
        ("GET", "/v1/models", cluster.models),
        ("POST", "/place_instance", instances.place),
        ("GET", "/instance/await", instances.wait_ready),
        ("GET", "/instance/{instance_id}", instances.get),
        ("DELETE", "/instance/{instance_id}", instances.delete),
        ("POST", "/join_code/rotate", CodeRoutes(backend, read_body).rotate),
    ]
    for method, path, endpoint in routes:
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    return app


# ---- answers ----


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def error_response(error: RequestError) -> Response:
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    return json_response(render_error(error.message, error.status, error.param), error.status, headers)


async def refused(_: Request, error: RequestError) -> Response:
    return error_response(error)


async def unrouted(request: Request, error: HTTPException) -> Response:
    sentence = f"{error.detail}: {request.method} {request.url.path}. GET /openapi.json lists the routes."
    return json_response(render_error(sentence, error.status_code), error.status_code, error.headers)


async def gone(_: Request, __: ClientDisconnect) -> Response:
    return Response(status_code=400)  # nobody reads it: the client went away


async def crashed(_: Request, __: Exception) -> Response:
    return error_response(RequestError("Something went wrong on this node; its log says what.", status=500))


ERROR_HANDLERS: Final[dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]]] = {
    RequestError: refused,
    HTTPException: unrouted,
    ClientDisconnect: gone,
    Exception: crashed,
}


class StreamResponse(Response):
    """An `EventStream` as the framework's kind of answer."""

    def __init__(self, stream: EventStream[Any]) -> None:
        super().__init__()
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = await self._stream.run(receive, send)
        if refused is not None:
            await error_response(refused)(scope, receive, send)


def stream(events: AsyncGenerator[Event, None], render: Callable[[Event], Iterable[bytes]]) -> Response:
    return StreamResponse(EventStream(events, render))


async def read_body(request: Request) -> bytes:
    """Raises `RequestError` 413 as soon as the body is known to be too large."""
    too_large = RequestError(f"The body is larger than the limit of {BODY_BYTES_MAX} bytes.", status=413)
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > BODY_BYTES_MAX:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_BYTES_MAX:
            raise too_large
    return bytes(body)


# ---- text ----


class Collected(msgspec.Struct):
    """An answer that is not streamed; `end` stays None if the client went away."""

    text: str = ""
    end: GenerationFinished | GenerationFailed | None = None


class ChatRoutes:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def complete(self, request: Request) -> Response:
        """OpenAI's chat completions, streamed or not."""
        call = openai_chat.parse(await read_body(request))
        events = await self._begin(call.request)
        answer = openai_chat.Answer(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), call.request.model_id)
        if call.stream:
            renderer = openai_chat.StreamRenderer(answer, include_usage=call.include_usage)
            return StreamResponse(EventStream(events, renderer.render, refusal))
        collected = await collect(request, events)
        if collected.end is None:
            raise ClientDisconnect
        if isinstance(collected.end, GenerationFailed):
            raise as_error(collected.end)
        body = openai_chat.render_answer(answer, collected.text, collected.end)
        return json_response(body, headers={"Server-Timing": server_timing(collected.end.timings)})

    async def generate(self, request: Request) -> Response:
        """Covey's own: every `GenerationEvent`, with token ids."""
        events = await self._begin(native.parse_generate(await read_body(request)))
        return StreamResponse(
            EventStream(events, lambda event: [native.render_event(event)], refusal, native.render_failure)
        )

    async def _begin(self, asked: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Resolves the model's name, unless an instance has it: its file may be known elsewhere only."""
        placed = {instance.card.model_id for instance in self._backend.state().instances}
        if asked.model_id not in placed:
            card = await self._backend.resolve_model(asked.model_id)
            asked = msgspec.structs.replace(asked, model_id=card.model_id)
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
    retry_after_s = RETRY_AFTER_S if failed.status in WORTH_A_RETRY else None
    return RequestError(failed.message, status=failed.status, retry_after_s=retry_after_s)


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
            elif isinstance(event, GenerationFinished | GenerationFailed):
                collected.end = event
        group.cancel_scope.cancel()
    return collected


# ---- the cluster ----


class ClusterRoutes:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._created_s = int(time.time())

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
        stable = value if path else {name: part for name, part in value.items() if name != "lastSeen"}
        return revalidated(request, value, stable)

    async def snapshot(self, request: Request) -> Response:
        """The `ClusterState`, as Covey's own clients read it."""
        state = self._backend.state()
        return revalidated(request, state, without_ages(state))

    async def changes(self, _: Request) -> Response:
        """The `ClusterState`, at once and at every change, as an event stream."""
        return stream(self._changes(), lambda state: [native.render_change(state)])

    async def _changes(self) -> AsyncGenerator[ClusterState, None]:
        revision: int | None = None
        while True:
            state = self._backend.state()
            if state.revision != revision:
                revision = state.revision
                yield state
            await self._backend.wait_changed(state.revision, WAIT_S_MAX)

    async def models(self, request: Request) -> Response:
        """The models that can be named here; `status=downloaded` keeps those on this node's disk."""
        status = request.query_params.get("status")
        return json_response(models.render_models(self._backend.models(), self._created_s, status))


def without_ages(state: ClusterState) -> ClusterState:
    """The state without what time alone changes."""
    members = tuple(msgspec.structs.replace(member, heard_ms_ago=0) for member in state.members)
    return msgspec.structs.replace(state, members=members)


def revalidated(request: Request, value: Any, stable: Any) -> Response:
    """`value`, or 304 if the client has it already; the ETag is made of `stable`."""
    digest = hashlib.sha256(msgspec.json.encode(stable)).hexdigest()[:32]
    headers = {**NO_STORE, "ETag": f'W/"{digest}"'}
    if digest in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return json_response(value, headers=headers)


# ---- instances ----


class InstanceRoutes:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def place(self, request: Request) -> Response:
        """Places a model; answers when the leader has decided, with the id of the instance."""
        asked = cluster_commands.parse_place(await read_body(request))
        card = await self._backend.resolve_model(asked.model_id)
        result = await self._backend.submit(asked.command(card))
        instance_id = cluster_commands.accepted_instance(result.outcome)
        return json_response(cluster_commands.render_placed(result.command_id, card, instance_id))

    async def get(self, request: Request) -> Response:
        """One instance."""
        state = self._backend.state()
        instance = cluster_commands.instance_with(state, request.path_params["instance_id"])
        return json_response(cluster_commands.render_instance(state, instance), headers=NO_STORE)

    async def delete(self, request: Request) -> Response:
        """Stops an instance; its runners end."""
        instance_id = InstanceId(request.path_params["instance_id"])
        result = await self._backend.submit(DeleteInstance(instance_id))
        cluster_commands.accepted_instance(result.outcome)
        return json_response(cluster_commands.render_deleted(result.command_id, instance_id))

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
