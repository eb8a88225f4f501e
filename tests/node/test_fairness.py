"""Two people share a model, each with an API key: the flood of one does not hold up the other. Real processes."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from nodes import NodeProcess, running, until
from tiny_model import write_model

from covey.engine.waiting import QUEUE_MAX, RETRY_SECONDS_MAX

WAIT_S = 60
TOKENS = 20  # at 20 ms each


class Node:
    """With one slot, two keys, and a fake engine that takes its time."""

    def __init__(self, process: NodeProcess, model: Path) -> None:
        self.process = process
        self.home = model.parent
        self.model = str(model)
        self.keys = {name: process.post("/keys", {"name": name})["key"] for name in ("flood", "guest")}

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.process.url, limits=limits, timeout=WAIT_S) as client:
            yield client

    def call(self, key: str, tokens: int = TOKENS, **fields: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": "Tell me more."}]
        body = {"model": self.model, "messages": messages, "max_tokens": tokens, "seed": 1, **fields}
        return {"url": "/v1/chat/completions", "json": body, "headers": {"x-api-key": self.keys[key]}}

    def load(self) -> tuple[int, int]:
        """Requests that run and wait, as the head reports them."""
        reports = [each["report"] for each in self.process.get("/cluster")["members"]]
        [runner] = [runner for report in reports for runner in report["runners"]]
        return runner["requests_running"], runner["requests_queued"]


@pytest.fixture
def node(tmp_path: Path) -> Generator[Node]:
    model = write_model(tmp_path / "model.gguf", layers=4)
    with running(tmp_path, "a", step_delay_ms="20") as (process,):
        process.post("/place_instance", {"model_id": str(model), "slot_count": 1})
        until(lambda: list(process.runners().values()) == ["Ready"])
        yield Node(process, model)


class Stream:
    """A streamed answer: its lines, and whether it has ended."""

    def __init__(self, client: httpx.AsyncClient, call: dict[str, Any]) -> None:
        self.lines: list[str] = []
        self.task = asyncio.create_task(self._read(client, call))

    async def _read(self, client: httpx.AsyncClient, call: dict[str, Any]) -> None:
        async with client.stream("POST", **call) as answer:
            async for line in answer.aiter_lines():
                self.lines.append(line)

    @property
    def comments(self) -> list[str]:
        return [line for line in self.lines if line.startswith(": queued")]

    @property
    def errors(self) -> list[dict[str, Any]]:
        found = [json.loads(line[6:]) for line in self.lines if line.startswith("data: {")]
        return [each["error"] for each in found if "error" in each]


async def wait(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - the other side of a socket
            await asyncio.sleep(0.02)


def test_one_request_does_not_wait_for_a_flood(node: Node) -> None:
    async def story() -> None:
        ended: list[str] = []

        async def ask(client: httpx.AsyncClient, key: str) -> None:
            answer = await client.post(**node.call(key))
            assert answer.is_success, answer.text
            ended.append(key)

        async with node.client() as client:
            floods = [asyncio.create_task(ask(client, "flood")) for _ in range(12)]
            await asyncio.sleep(0.2)
            await ask(client, "guest")
            place = len(ended)
            await asyncio.gather(*floods)
        assert place <= 3, ended  # one that ran when it came, and one that may have come just before

    asyncio.run(story())


def test_a_full_queue_makes_room_for_another_key(node: Node) -> None:
    """Places are told as they change; who is one too many is told when to come back, as fits what it has heard."""

    async def story() -> None:
        async with node.client() as client:
            floods = [Stream(client, node.call("flood", tokens=400, stream=True))]
            await wait(lambda: any('"delta":{"content"' in line for line in floods[0].lines))
            floods += [Stream(client, node.call("flood", tokens=400, stream=True)) for _ in range(QUEUE_MAX)]
            await wait(lambda: all(each.comments for each in floods[1:]))
            await wait(lambda: {each.comments[-1] for each in floods[1:]} == places(QUEUE_MAX))

            refused = await client.post(**node.call("flood"))
            assert refused.status_code == 429
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert 1 <= int(refused.headers["retry-after"]) <= RETRY_SECONDS_MAX

            guest = Stream(client, node.call("guest", stream=True))
            await wait(lambda: guest.comments)
            assert guest.comments[0] == f": queued 1 of {QUEUE_MAX}"
            await wait(lambda: any(each.errors for each in floods))
            [displaced] = [each for each in floods if each.errors]
            assert displaced.comments[-1] == f": queued {QUEUE_MAX} of {QUEUE_MAX}"
            assert displaced.errors[0]["status"] == 429
            assert displaced.lines[-2] == "data: [DONE]"

            floods[0].task.cancel()  # the slot goes to the guest, whoever came before
            await wait(guest.task.done)
            assert "data: [DONE]" in guest.lines
            assert not guest.errors
            for each in floods:
                each.task.cancel()
                with suppress(asyncio.CancelledError):
                    await each.task

    asyncio.run(story())
    until(lambda: node.load() == (0, 0))
    logs = [path.read_text() for path in node.home.rglob("*.log")]
    assert "flood" not in "".join([*logs, node.process.errors()])


def places(count: int) -> set[str]:
    return {f": queued {position} of {count}" for position in range(1, count + 1)}
