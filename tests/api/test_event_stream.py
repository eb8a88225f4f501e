"""A client that waits hears something; a client that has gone ends what it asked for. Over real sockets."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
import uvicorn

from covey.api import event_stream
from covey.api.errors import render_error
from covey.api.server import create_app
from covey.schema.generation import GenerationEvent, GenerationFailed, GenerationRequest
from covey.schema.runner import RunnerState
from tests.api.fake_backend import ANSWER, FakeBackend, cluster

BODY = {"model": "Tiny-Chat", "messages": [{"role": "user", "content": "hi"}]}
WAIT_S = 10
CRASHED = "Something went wrong on this node; its log says what."


@contextlib.asynccontextmanager
async def served(backend: FakeBackend) -> AsyncIterator[str]:
    """The API on a free port of this machine; yields its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(backend), log_level="warning", lifespan="off"))
    task = asyncio.create_task(server.serve([listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await asyncio.wait_for(task, WAIT_S)
        listener.close()


async def until_closed(backend: FakeBackend, count: int = 1) -> None:
    async with asyncio.timeout(WAIT_S):
        while backend.closed < count:  # noqa: ASYNC110 - the fake has no more to tell
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate"])
def test_a_client_that_leaves_a_stream_cancels_it(path: str) -> None:
    async def story() -> None:
        backend = FakeBackend(hang_after=3)
        body = BODY if path == "/generate" else {**BODY, "stream": True}
        async with served(backend) as url, httpx.AsyncClient(base_url=url) as client:
            async with client.stream("POST", path, json=body) as answer:
                async for line in answer.aiter_lines():
                    if "Hello" in line:
                        break
                assert backend.closed == 0
            await until_closed(backend)

    asyncio.run(story())


def test_a_client_that_leaves_before_the_answer_cancels_it() -> None:
    async def story() -> None:
        backend = FakeBackend(hang_after=2)
        async with served(backend) as url, httpx.AsyncClient(base_url=url) as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.post("/v1/chat/completions", json=BODY, timeout=0.5)
            await until_closed(backend)

    asyncio.run(story())


def test_silence_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "FIRST_EVENT_S_MAX", 0.05)
    monkeypatch.setattr(event_stream, "SILENCE_S_MAX", 0.05)

    async def story() -> None:
        backend = FakeBackend(hang_after=0)
        async with served(backend) as url, httpx.AsyncClient(base_url=url) as client:
            async with client.stream("POST", "/v1/chat/completions", json={**BODY, "stream": True}) as answer:
                assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
                heard = 0
                async for line in answer.aiter_lines():
                    heard += line == ": keep-alive"
                    if heard == 3:
                        break
            await until_closed(backend)

    asyncio.run(story())


@pytest.mark.parametrize(
    ("path", "last"),
    [
        (
            "/v1/chat/completions",
            [render_error("The node has not the model.", 404, "model", "model_not_found"), "[DONE]"],
        ),
        (
            "/generate",
            [
                {
                    "type": "GenerationFailed",
                    "message": "The node has not the model.",
                    "status": 404,
                    "retry_after_s": 0,
                    "param": None,
                }
            ],
        ),
    ],
)
def test_a_refusal_that_comes_late_is_told_in_the_dialects_own_way(
    monkeypatch: pytest.MonkeyPatch, path: str, last: list[Any]
) -> None:
    monkeypatch.setattr(event_stream, "FIRST_EVENT_S_MAX", 0.01)

    class Slow(FakeBackend):
        async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
            self.requests.append(request)
            await asyncio.sleep(0.1)
            yield GenerationFailed("The node has not the model.", 404)

    assert asyncio.run(ends_of(Slow(), path)) == last


@pytest.mark.parametrize(
    ("path", "last"),
    [
        (
            "/v1/chat/completions",
            [render_error(CRASHED, 500), "[DONE]"],
        ),
        (
            "/generate",
            [{"type": "GenerationFailed", "message": CRASHED, "status": 500, "retry_after_s": 0, "param": None}],
        ),
    ],
)
def test_a_mistake_of_ours_in_a_stream_is_told_in_the_dialects_own_way(path: str, last: list[Any]) -> None:
    class Crashing(FakeBackend):
        async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
            self.requests.append(request)
            yield ANSWER[0]
            raise AssertionError

    assert asyncio.run(ends_of(Crashing(), path))[-len(last) :] == last


async def ends_of(backend: FakeBackend, path: str) -> list[Any]:
    """The data of the events of an answer with status 200."""
    body = BODY if path == "/generate" else {**BODY, "stream": True}
    async with served(backend) as url, httpx.AsyncClient(base_url=url) as client:
        answer = await client.post(path, json=body)
    assert answer.status_code == 200
    data = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


async def told(client: httpx.AsyncClient, count: int, last_id: str = "") -> AsyncIterator[tuple[str, str, Any]]:
    """Name, id and data of the first `count` events of `GET /cluster/stream`."""
    headers = {"Last-Event-ID": last_id} if last_id else {}
    name = event_id = ""
    async with client.stream("GET", "/cluster/stream", headers=headers) as answer:
        async for line in answer.aiter_lines():
            name = line[7:] if line.startswith("event: ") else name
            event_id = line[4:] if line.startswith("id: ") else event_id
            if line.startswith("data: "):
                yield name, event_id, json.loads(line[6:])
                count -= 1
                if not count:
                    return


def test_the_cluster_is_streamed_whole_and_then_by_what_changes() -> None:
    async def story() -> None:
        backend = FakeBackend(current=cluster(RunnerState.READY, RunnerState.READY))
        async with served(backend) as url, httpx.AsyncClient(base_url=url) as client:
            events = told(client, 3)
            name, _, data = await anext(events)
            assert (name, data["revision"], len(data["members"])) == ("state", 7, 2)
            backend.current = cluster(RunnerState.READY, RunnerState.RUNNING, revision=8)
            name, first_id, data = await anext(events)
            assert (name, sorted(data), list(data["changed"])) == ("change", ["changed", "revision"], ["members"])
            (member,) = data["changed"]["members"].values()
            assert member["report"]["runners"][0]["state"] == "Running"
            backend.current = msgspec.structs.replace(backend.current, instances=(), leader=None, revision=9)
            _, second_id, data = await anext(events)
            assert data == {"revision": 9, "leader": None, "removed": {"instances": ["inst-1"]}}
            await events.aclose()

            again = [event async for event in told(client, 1, first_id)]  # what was missed, in one change
            assert again == [("change", second_id, data)]
            for strange in ("elsewhere-1", f"{second_id}9", "-", "x" * 3000):
                assert [each[0] async for each in told(client, 1, strange)] == ["state"]

    asyncio.run(story())


def test_what_only_ages_is_no_change() -> None:
    async def story() -> None:
        backend = FakeBackend()
        async with served(backend) as url, httpx.AsyncClient(base_url=url) as client:
            events = told(client, 2)
            await anext(events)
            for age in (300, 600, 900):
                older = tuple(msgspec.structs.replace(each, heard_ms_ago=age) for each in backend.current.members)
                backend.current = msgspec.structs.replace(backend.current, members=older, revision=age)
                await asyncio.sleep(0.15)
            backend.current = cluster(revision=1000)
            assert (await anext(events))[2]["revision"] == 1000
            await events.aclose()

    asyncio.run(story())


def test_many_streams_at_once_do_not_mix() -> None:
    async def one(client: httpx.AsyncClient) -> str:
        answer = await client.post("/generate", json=BODY)
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
        return "".join(event["text"] for event in events if event["type"] == "TextGenerated")

    async def story() -> None:
        async with served(FakeBackend()) as url, httpx.AsyncClient(base_url=url) as client:
            assert set(await asyncio.gather(*(one(client) for _ in range(20)))) == {"Hello, world – 🐦"}

    asyncio.run(story())
