"""Somebody presses Ctrl-C at the node that clients are connected to: each of their answers ends with the reason, in the
words of its dialect, and none just stops.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import httpx
import pytest

from covey.api import event_stream
from covey.api.server import create_app
from covey.effects.http_server import GRACE_S, HttpServer, listen, port_of
from covey.schema.generation import Admit, Cancel, GenerationFailed, Prefilled, Queued, TokenSampled
from covey.schema.runner import Address, RunnerState
from covey.schema.wire import pack
from covey.serving.serving import Serving
from tests.api.fake_backend import CARD, FakeBackend
from tests.serving.fake_head import FakeHead
from tests.serving.one_node import READY, Node, request, told, until

REASON = "This node is being stopped; send the request to another one."
STOPPED = {"message": REASON, "type": "server_error", "param": None, "code": None, "status": 503}
NOWHERE = Address("127.0.0.1", 1)
ASKED: dict[str, Any] = {"model": CARD.model_id, "messages": [{"role": "user", "content": "Hi"}]}


class EndlessHead(FakeHead):
    """On another node, so that it speaks on until it is told to stop."""

    def _hear(self, command: Any, writer: asyncio.StreamWriter) -> None:
        super()._hear(command, writer)
        if isinstance(command, Admit):
            self.speaking = asyncio.create_task(self._speak(command, writer))
        elif isinstance(command, Cancel):
            self.speaking.cancel()

    async def _speak(self, admit: Admit, writer: asyncio.StreamWriter) -> None:
        first = len(admit.token_ids)
        for number in range(1000):
            writer.write(pack(TokenSampled(admit.request_id, admit.attempt, first + number, ord("x"))))
            await asyncio.sleep(0.01)


def reads(admit: Admit) -> list[Any]:
    return [Prefilled(admit.request_id, admit.attempt, 2, 2, 0)]


def queues(admit: Admit) -> list[Any]:
    return [Queued(admit.request_id, admit.attempt, 4, 5)]


def speaking() -> tuple[FakeHead, RunnerState]:
    return EndlessHead(reads), READY


def silent() -> tuple[FakeHead, RunnerState]:
    return FakeHead(queues), READY


def loading() -> tuple[FakeHead, RunnerState]:
    return FakeHead(reads), RunnerState.LOADING


def unreachable() -> tuple[FakeHead, RunnerState]:
    return FakeHead(reads), READY


Case = Callable[[], tuple[FakeHead, RunnerState]]
every_case = pytest.mark.parametrize("case", [speaking, silent, loading, unreachable])


class Backend(FakeBackend):
    """A node in memory whose answers come from a head."""

    serving: Serving

    def generate(self, request: Any) -> AsyncGenerator[Any, None]:
        return self.serving.generate(request)


@asynccontextmanager
async def living(case: Case) -> AsyncIterator[tuple[FakeHead, Serving, HttpServer, httpx.AsyncClient]]:
    head, state = case()
    async with head.listening():
        node = Node(NOWHERE if case is unreachable else head.address, READY, state)
        async with node.serving() as serving:
            backend = Backend(current=node.state)
            backend.serving = serving
            listener = listen("127.0.0.1", 0)
            server = HttpServer(create_app(backend), listener)
            task = asyncio.create_task(server.serve())
            url = f"http://127.0.0.1:{port_of(listener)}"
            async with httpx.AsyncClient(base_url=url, timeout=20) as client:
                yield head, serving, server, client
                server.stop()
            await task


def stop(serving: Serving, server: HttpServer) -> float:
    """As a node does that was sent SIGTERM and whose runners are gone. When that was."""
    serving.leave()
    server.stop()
    return time.monotonic()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "FIRST_EVENT_S_MAX", 0.05)


@pytest.mark.timed
@every_case
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate"])
def test_a_stream_ends_with_the_reason_and_its_last_event(case: Case, path: str) -> None:
    async def story() -> None:
        async with living(case) as (_, serving, server, client):
            body = ASKED if path == "/generate" else {**ASKED, "stream": True}
            async with client.stream("POST", path, json=body) as answer:
                lines = answer.aiter_lines()
                assert answer.status_code == 200
                assert (await anext(lines)).startswith(":")
                await asyncio.sleep(0.1)
                stopped_s = stop(serving, server)
                said = [line.removeprefix("data: ") async for line in lines if line.startswith("data: ")]
            assert time.monotonic() - stopped_s < GRACE_S
            if path == "/generate":
                failed = json.loads(said[-1])
                assert (failed["type"], failed["message"], failed["status"]) == ("GenerationFailed", REASON, 503)
            else:
                assert said[-1] == "[DONE]"
                assert json.loads(said[-2]) == {"error": STOPPED}

    told(story)


@pytest.mark.timed
@every_case
def test_an_answer_in_one_piece_becomes_a_503(case: Case) -> None:
    async def story() -> None:
        async with living(case) as (_, serving, server, client):
            task = asyncio.create_task(client.post("/v1/chat/completions", json=ASKED))
            await asyncio.sleep(0.3)
            assert not task.done()
            stopped_s = stop(serving, server)
            answer = await task
            assert time.monotonic() - stopped_s < GRACE_S
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert answer.json() == {"error": STOPPED}

    told(story)


def test_what_comes_after_the_signal_is_refused() -> None:
    async def story() -> None:
        async with living(speaking) as (head, serving, _, client):
            serving.leave()
            assert (await client.post("/v1/chat/completions", json={**ASKED, "stream": True})).status_code == 503
            assert head.admits == []

    told(story)


def test_the_head_is_told_and_what_its_client_has_not_fetched_yet_holds_up_nothing() -> None:
    async def story() -> None:
        async with living(speaking) as (head, serving, _, _), aclosing(serving.generate(request())) as events:
            await anext(events)
            await asyncio.sleep(0.1)
            assert not head.cancels
            serving.leave()
            assert [event async for event in events] == [GenerationFailed(REASON, 503)]
            await until(lambda: head.cancels)

    told(story)
