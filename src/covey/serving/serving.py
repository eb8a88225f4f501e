"""One request's life on the node that holds its HTTP connection: from messages to the last word of the answer.

Pick an instance, write the prompt, send it to the head, turn what comes back into text, and leave nothing running:
the request is cancelled at the head whenever its iterator is closed before the end. Prompts are never logged.

A head that is lost on the way does not end the answer. The next attempt goes to whatever instance of the model is
ready by then, with the prompt and the tokens that came so far; the tokens after them are numbered on, so that none is
told twice and none is missing.
"""

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from types import TracebackType
from typing import Final, Self

import anyio
import msgspec
from anyio.abc import TaskGroup

from covey.control import routing
from covey.schema.cluster import ClusterState, Instance
from covey.schema.generation import Admit, Broken, GenerationEvent, GenerationFailed, GenerationRequest, HeadEvent
from covey.schema.ids import InstanceId, RequestId
from covey.schema.model import ModelCard
from covey.schema.trust import Credentials
from covey.serving.answer import AnswerText
from covey.serving.choosing import Choosing, held
from covey.serving.head import HeadConnection, HeadLostError, HeadPlace, Heads, HeadStream
from covey.serving.model_text import ModelTexts
from covey.serving.progress import FIRST_ATTEMPT, Progress
from covey.serving.refusal import RefusedError
from covey.text.detokenize import IncrementalDecoder
from covey.text.stop import StopStrings

WATCH_S_MAX: Final = 60.0  # one wait for a change of the cluster; then we look again
SEED_BITS: Final = 63
GONE: Final = 503  # HTTP: try again, another instance may be up
ATTEMPTS_MAX: Final = 5  # of one request: what ends its runner each time must not go round for ever
REACH_S_MAX: Final = 10.0  # for a head that is said to be ready, and the connection to it
SPACING_S: Final = 0.25  # before the next attempt
SILENCE_S: Final = 1.0  # of a head, then we look whether it can speak
PASSING: Final = (503,)  # a head's refusals that say nothing about the request itself

_log = logging.getLogger(__name__)


class Serving:
    """Answers requests on this node. Used as `async with`, which ends its connections.

    `state` and `wait_changed` are the node's view of the cluster; `texts` knows the models' tokenizers and templates.
    """

    def __init__(
        self,
        state: Callable[[], ClusterState],
        wait_changed: Callable[[int, float], Awaitable[None]],
        texts: ModelTexts,
        credentials: Credentials,
    ) -> None:
        self._choosing = Choosing(state, wait_changed)
        self._texts = texts
        self._readers: TaskGroup = anyio.create_task_group()
        self._heads = Heads(credentials, self._start_reader)
        self._is_leaving = False

    async def __aenter__(self) -> Self:
        await self._readers.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._readers.cancel_scope.cancel()
        return await self._readers.__aexit__(kind, error, trace)

    def leave(self) -> None:
        """From now on what breaks is not tried again: this node is being stopped, and takes its runners along."""
        self._is_leaving = True

    def _start_reader(self, connection: HeadConnection) -> None:
        self._readers.start_soon(connection.read)

    async def read_ahead(self) -> None:
        """For ever: reads the text of each model that this node has a part of as soon as its file is here, so that
        the first request is answered, or refused, without that wait. Large vocabularies take seconds.
        """
        begun: set[InstanceId] = set()
        async with anyio.create_task_group() as tasks:
            while True:
                state = self._choosing.state()
                begun &= {instance.instance_id for instance in state.instances}
                for instance in held(state):
                    if instance.instance_id not in begun:
                        begun.add(instance.instance_id)
                        tasks.start_soon(self._read, instance.card)
                await self._choosing.wait_changed(state.revision, WATCH_S_MAX)

    async def _read(self, card: ModelCard) -> None:
        try:
            await self._texts.of(card)
        except RefusedError as refused:
            _log.warning("requests for %s will be refused: %s", card.model_id, refused)
        except Exception:  # noqa: BLE001 (the top of this task: a request tries again, and the node goes on)
            _log.exception("the text of %s could not be read ahead; the next request for it tries again", card.model_id)

    # ---- one request ----

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """The answer, up to `GenerationFinished` or `GenerationFailed`. Closing the iterator cancels the request."""
        try:
            instance = await self._choosing.ready(request.model_id)
            progress = await self._begin(request, instance)
            while not progress.done:
                try:
                    async with aclosing(self._attempt(instance.card, progress)) as events:
                        async for event in events:
                            yield event
                except HeadLostError as lost:
                    await self._go_on(progress, instance.card, lost)
        except RefusedError as refused:
            _log.info("a request for %s was refused (%d)", request.model_id, refused.status)
            yield GenerationFailed(refused.message, refused.status)

    async def _begin(self, request: GenerationRequest, instance: Instance) -> Progress:
        """A request that can be sent to a head. Raises `RefusedError`."""
        text = await self._texts.of(instance.card)
        token_ids = await asyncio.to_thread(text.prompt_ids, request.messages)
        seed = secrets.randbits(SEED_BITS) if request.seed is None else request.seed
        admit = Admit(
            request_id=RequestId(uuid.uuid4().hex),
            attempt=FIRST_ATTEMPT,
            token_ids=tuple(token_ids),
            prompt_length=len(token_ids),
            sampling=msgspec.structs.replace(request.sampling, seed=seed),
            token_count_max=token_count_max(request, len(token_ids), instance),
            stop_token_ids=tuple(sorted(text.stop_token_ids)),
        )
        answer = AnswerText(IncrementalDecoder(text.token_bytes), StopStrings(request.stop), len(token_ids))
        return Progress(admit, answer, time.monotonic)

    async def _attempt(self, card: ModelCard, progress: Progress) -> AsyncGenerator[GenerationEvent, None]:
        """What one head adds to the answer. Raises `HeadLostError` if it can't go on to the end, `RefusedError`."""
        instance, connection = await self._reach(card, progress.loss)
        async with connection.admitted(progress.admit) as stream:
            while not progress.done:
                event = await self._next(stream, instance)
                if isinstance(event, Broken) and event.status in PASSING:
                    raise HeadLostError(event.message)
                for each in progress.take(event):
                    yield each

    async def _reach(self, card: ModelCard, loss: str) -> tuple[Instance, HeadConnection]:
        """A ready instance, and the connection to its head. Raises `RefusedError`; `loss` is why another is sought.

        The cluster notices only after seconds that a head is gone; until then it is tried again.
        """
        deadline = time.monotonic() + REACH_S_MAX
        while True:
            instance = await self._ready(card, loss)
            try:
                return instance, await self._connect(instance)
            except HeadLostError as lost:
                if time.monotonic() >= deadline:
                    raise RefusedError(f"{lost} Send the request again.", GONE) from None
                loss = str(lost)
                await asyncio.sleep(SPACING_S)

    async def _ready(self, card: ModelCard, loss: str) -> Instance:
        """Raises `RefusedError`."""
        try:
            found = await self._choosing.ready(card.model_id)
        except RefusedError as refused:
            raise RefusedError(f"{loss} {refused.message}".strip(), refused.status) from None
        if found.card != card:  # placed anew while the request was under way
            raise RefusedError(f"{loss} Another file goes by the name of {card.model_id} now.".strip(), GONE)
        return found

    async def _next(self, stream: HeadStream, instance: Instance) -> HeadEvent:
        """What the head says next. Raises `HeadLostError`.

        A machine that is switched off or asleep says nothing, and closes nothing: a silent head is looked at.
        """
        while True:
            try:
                async with asyncio.timeout(SILENCE_S):
                    return await stream.next()
            except TimeoutError:
                if loss := self._choosing.loss(instance):
                    raise HeadLostError(loss) from None

    async def _go_on(self, progress: Progress, card: ModelCard, lost: HeadLostError) -> None:
        """Raises `RefusedError` if it was tried often enough, or is not to be tried again."""
        if self._is_leaving:
            raise RefusedError(f"{lost} This node is being stopped.", GONE)
        if progress.admit.attempt >= ATTEMPTS_MAX:
            message = f"{lost} This was attempt {ATTEMPTS_MAX}, so the request is given up; send it again."
            raise RefusedError(message, GONE)
        _log.warning("an answer of %s goes on elsewhere: %s", card.model_id, lost)
        progress.begin_next_attempt(str(lost))
        await asyncio.sleep(SPACING_S)

    async def _connect(self, instance: Instance) -> HeadConnection:
        """Raises `HeadLostError`."""
        addresses = routing.head_addresses(self._choosing.state(), instance)
        if not addresses:
            raise HeadLostError(f"The head of {instance.card.model_id} has gone.")
        return await self._heads.connect(HeadPlace(instance.instance_id, instance.stages[0].node_id, addresses))


def token_count_max(request: GenerationRequest, prompt_tokens: int, instance: Instance) -> int:
    """As many as were asked for, and as the context holds. Raises `RefusedError` if it holds none."""
    room = instance.context_length - prompt_tokens
    if room <= 0:
        can_grow = instance.context_length < instance.card.context_length_max
        way_out = "Shorten the prompt, or place the model with more context." if can_grow else "Shorten the prompt."
        raise RefusedError(
            f"The prompt has {prompt_tokens} tokens, and the context of {request.model_id} holds"
            f" {instance.context_length} with the answer. {way_out}",
            400,
        )
    return room if request.token_count_max is None else min(room, request.token_count_max)
