"""A model loads for minutes, or recovers, and everybody asks it something meanwhile: so many wait and no more, and who
asks once is not kept out by who asks a hundred times.
"""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import chain

import msgspec
import pytest

from covey.api import event_stream
from covey.engine.waiting import QUEUE_MAX
from covey.schema.generation import GenerationEvent, GenerationFailed, GenerationFinished
from covey.schema.ids import ModelId
from covey.schema.runner import RunnerState
from covey.serving import serving as serving_module
from covey.serving.lines import Lines
from covey.serving.serving import Serving
from tests.api.fake_backend import cluster
from tests.serving.fake_head import FakeHead
from tests.serving.one_node import READY, Node, all_of, at, request, rest_of, says, text_of, told, until
from tests.serving.test_leaving import ASKED, living, loading

Events = list[GenerationEvent]
Ask = Callable[[str, int], list[asyncio.Task[Events]]]
Story = Callable[[Node, Ask, Callable[[], None]], Awaitable[None]]


def while_it_loads(story: Story) -> None:
    async def run() -> None:
        async with FakeHead(says("Hello")).listening() as head:
            node = Node(head.address, READY, RunnerState.LOADING)

            def loaded() -> None:
                node.state = at(cluster(READY, READY, revision=node.state.revision + 1), head.address)

            async with node.serving() as serving:
                await story(node, lambda account, count: asked(serving, account, count), loaded)

    told(run)


def asked(serving: Serving, account: str, count: int) -> list[asyncio.Task[Events]]:
    return [asyncio.create_task(all_of(serving, request(account=account))) for _ in range(count)]


def refused(tasks: list[asyncio.Task[Events]]) -> list[int]:
    """Which of them were, each before anything else came."""
    done = [(number, task.result()) for number, task in enumerate(tasks) if task.done()]
    for _, events in done:
        [failed] = events
        assert isinstance(failed, GenerationFailed)
        assert failed.status == 429
        assert f"{QUEUE_MAX} requests are waiting for it" in failed.message
    return [number for number, _ in done]


def test_who_is_one_too_many_is_told_at_once() -> None:
    async def story(_: Node, ask: Ask, loaded: Callable[[], None]) -> None:
        flood = ask("flood", QUEUE_MAX)
        await asyncio.sleep(0.2)
        assert refused(flood) == []
        late = ask("flood", 3)
        await until(lambda: refused(late) == [0, 1, 2])
        assert refused(flood) == []
        loaded()
        assert {text_of(events) for events in await asyncio.gather(*flood)} == {"Hello"}

    while_it_loads(story)


def test_the_newest_of_who_waits_with_the_most_makes_room_for_another() -> None:
    async def story(_: Node, ask: Ask, loaded: Callable[[], None]) -> None:
        flood = ask("flood", QUEUE_MAX)
        await asyncio.sleep(0.2)
        guest = ask("guest", 1)
        await until(lambda: refused(flood) == [QUEUE_MAX - 1])
        [failed] = flood[-1].result()
        assert isinstance(failed, GenerationFailed)
        assert "made room for another's" in failed.message
        guests = ask("guest", QUEUE_MAX)  # until both wait with as many
        await until(lambda: len(refused(guests)) == QUEUE_MAX // 2 + 1)
        assert len(refused(flood)) == QUEUE_MAX // 2
        loaded()
        answers = [await task for task in chain(guest, guests, flood)]
        assert sum(isinstance(events[-1], GenerationFinished) for events in answers) == QUEUE_MAX

    while_it_loads(story)


def test_requests_without_a_key_are_of_one_account_here_too() -> None:
    async def story(_: Node, ask: Ask, __: Callable[[], None]) -> None:
        tasks = [*ask("", QUEUE_MAX // 2), *ask("key", QUEUE_MAX // 2)]
        await asyncio.sleep(0.2)
        late = [*ask("", 1), *ask("key", 1), *ask("other", 1)]
        await until(lambda: refused(late) == [0, 1] and len(refused(tasks)) == 1)
        for task in chain(tasks, late):
            task.cancel()

    while_it_loads(story)


def test_who_leaves_makes_room() -> None:
    async def story(_: Node, ask: Ask, loaded: Callable[[], None]) -> None:
        flood = ask("flood", QUEUE_MAX)
        await asyncio.sleep(0.2)
        flood.pop().cancel()
        await asyncio.sleep(0.05)
        last, *late = ask("flood", 2)
        await until(lambda: refused(late) == [0])
        loaded()
        assert text_of(await last) == "Hello"
        assert text_of((await asyncio.gather(*flood))[-1]) == "Hello"

    while_it_loads(story)


def test_an_answer_that_has_begun_waits_whoever_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its runner was lost, and is loaded anew."""
    monkeypatch.setattr(serving_module, "SPACING_S", 0.2)

    async def run() -> None:
        async with FakeHead(rest_of("Hello"), hang_up_after=3).listening() as head:
            node = Node(head.address, READY, READY)
            good = node.state
            async with node.serving() as serving:
                begun = asyncio.create_task(all_of(serving, request(account="flood")))
                await until(lambda: head.admits)
                node.state = at(cluster(READY, RunnerState.LOADING, revision=8), head.address)
                flood = asked(serving, "flood", QUEUE_MAX)
                await asyncio.sleep(0.5)
                assert not begun.done()
                assert refused(flood) == []
                late = asked(serving, "flood", 1)
                await until(lambda: refused(late) == [0])
                guest = asked(serving, "guest", 1)
                await until(lambda: refused(flood))
                head.hang_up_after = None
                node.state = msgspec.structs.replace(good, revision=9)
                assert text_of(await begun) == "Hello"
                assert text_of(await guest[0]) == "Hello"
                await asyncio.gather(*flood)

    told(run)


def test_the_status_is_429_although_a_stream_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "FIRST_EVENT_S_MAX", 1.0)

    async def run() -> None:
        async with living(loading) as (_, serving, _, client):
            flood = asked(serving, "", QUEUE_MAX)
            await asyncio.sleep(0.2)
            for path, more in (
                ("/v1/chat/completions", {"stream": True}),
                ("/v1/chat/completions", {}),
                ("/generate", {}),
            ):
                answer = await client.post(path, json={**ASKED, **more})
                assert (answer.status_code, answer.headers["retry-after"]) == (429, "5")
                assert answer.json()["error"]["code"] == "rate_limit_exceeded"
            for task in flood:
                task.cancel()

    told(run)


def test_each_model_has_a_line_of_its_own_and_an_empty_one_is_forgotten() -> None:
    lines = Lines()
    with lines.waiting(ModelId("a"), "x"), lines.waiting(ModelId("b"), "x"), lines.waiting(ModelId("a"), "y"):
        assert {model_id: len(line) for model_id, line in lines._lines.items()} == {"a": 2, "b": 1}
    assert lines._lines == {}
