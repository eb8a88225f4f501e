"""What serving sees of a node, and what tests ask of it: one model whose tokens are letters."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from covey.schema.cluster import ClusterState, Member, Visibility, Wish
from covey.schema.generation import (
    Admit,
    ChatMessage,
    GenerationEvent,
    GenerationRequest,
    HeadEvent,
    TextGenerated,
)
from covey.schema.model import ModelCard
from covey.schema.runner import Address, RunnerState
from covey.serving.model_text import ModelTexts
from covey.serving.refusal import MESSAGES, RefusedError
from covey.serving.serving import Serving
from tests.api.fake_backend import CARD, FIRST, cluster
from tests.credentials import credentials
from tests.credentials import node as identity
from tests.serving.fake_head import answer

READY = RunnerState.READY
WAIT_S = 10


class Letters:
    """A model whose tokens are the bytes of its text."""

    stop_token_ids = frozenset({0, 3})

    def prompt_ids(self, messages: Sequence[ChatMessage]) -> list[int]:
        if messages[0].role == "system":
            raise RefusedError("This model's template takes no system message.", 400, MESSAGES)
        return list("".join(message.content for message in messages).encode())

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def token_text(self, token_id: int) -> str:
        return "<end>" if token_id in self.stop_token_ids else chr(token_id)


def request(text: str = "Hi", **changes: Any) -> GenerationRequest:
    messages = (ChatMessage(changes.pop("role", "user"), text),)
    return GenerationRequest(model_id=CARD.model_id, messages=messages, **changes)


class Node:
    """What serving sees of a node: one instance, whose head listens at an address."""

    def __init__(self, address: Address, *states: RunnerState) -> None:
        self.state = at(cluster(*states), address)
        self.loads = 0

    async def wait_changed(self, revision: int, timeout_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.state.revision == revision:  # noqa: ASYNC110 - tests replace the snapshot freely
                    await asyncio.sleep(0.01)

    async def file_of(self, card: ModelCard) -> Path:
        return Path(card.model_id)

    def load(self, _: Path) -> Letters:
        self.loads += 1
        return Letters()

    def serving(self) -> Serving:
        return Serving(lambda: self.state, self.wait_changed, ModelTexts(self.file_of, self.load), credentials(1))


def at(state: ClusterState, address: Address) -> ClusterState:
    """With the head of the instance on node 0, which listens at `address`."""
    named = msgspec.json.encode(state).replace(FIRST.encode(), identity(0).node_id.encode())
    state = msgspec.json.decode(named, type=ClusterState)

    def moved(member: Member) -> Member:
        assert member.report is not None
        runners = tuple(msgspec.structs.replace(each, data_address=address) for each in member.report.runners)
        return msgspec.structs.replace(member, report=msgspec.structs.replace(member.report, runners=runners))

    return msgspec.structs.replace(state, members=tuple(moved(each) for each in state.members))


def away(state: ClusterState) -> ClusterState:
    """The same with its first node unseen."""
    first, *others = state.members
    unseen = msgspec.structs.replace(first, visibility=Visibility.AWAY)
    return msgspec.structs.replace(state, members=(unseen, *others), revision=state.revision + 1)


def lacking(state: ClusterState) -> ClusterState:
    """The same where its wish finds no other place."""
    [one] = state.instances
    wish = Wish(wish_id=one.wish_id, card=one.card, node_count_min=1, context_length=1024, slot_count=10**6)
    return msgspec.structs.replace(state, wishes=(wish,), revision=state.revision + 1)


def says(text: str) -> Callable[[Admit], list[HeadEvent]]:
    return lambda admit: answer(admit, list(text.encode()))


def rest_of(text: str) -> Callable[[Admit], list[HeadEvent]]:
    """An honest head's, also where the answer was begun elsewhere."""
    return lambda admit: answer(admit, list(text.encode())[len(admit.token_ids) - admit.prompt_length :])


async def all_of(serving: Serving, asked: GenerationRequest) -> list[GenerationEvent]:
    return [event async for event in serving.generate(asked)]


def text_of(events: list[GenerationEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextGenerated))


def ids_of(events: list[GenerationEvent]) -> bytes:
    return bytes(i for event in events if isinstance(event, TextGenerated) for i in event.token_ids)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - the other side of a socket
            await asyncio.sleep(0.005)


def told(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(story(), WAIT_S))
