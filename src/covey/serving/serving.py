"""One request's life on the node that holds its HTTP connection: from messages to the last word of the answer.

Pick an instance, write the prompt, send it to the head, turn what comes back into text, and leave nothing running:
the request is cancelled at the head whenever its iterator is closed before the end. Prompts are never logged.

A head that is lost on the way does not end the answer. The next attempt goes to whatever instance of the model is
ready by then, with the prompt and the tokens that came so far; the tokens after them are numbered on, so that none is
told twice and none is missing.
"""

import asyncio
import logging
import math
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from contextlib import aclosing
from types import TracebackType
from typing import Final, Self

import anyio
import msgspec
from anyio.abc import TaskGroup

from covey.control import routing
from covey.control.settings import MachineSettings
from covey.schema.cluster import ClusterState, Instance
from covey.schema.generation import Admit, Broken, GenerationEvent, GenerationFailed, GenerationRequest, HeadEvent
from covey.schema.ids import InstanceId, NodeId, RequestId
from covey.schema.model import ModelCard
from covey.schema.trust import Credentials
from covey.serving.answer import AnswerText, Names
from covey.serving.checking import check_bias, check_constraint
from covey.serving.choosing import Choosing, Needs, held
from covey.serving.ending import Ending
from covey.serving.head import HeadConnection, HeadLostError, HeadPlace, Heads, HeadStream, Reader
from covey.serving.model_text import ModelText, ModelTexts
from covey.serving.progress import FIRST_ATTEMPT, Progress
from covey.serving.refusal import MESSAGES, RefusedError
from covey.text.detokenize import IncrementalDecoder
from covey.text.stop import StopStrings

WATCH_S_MAX: Final = 60.0  # one wait for a change of the cluster; then we look again
SEED_BITS: Final = 63
GONE: Final = 503  # HTTP: try again, another instance may be up
TRIES_MAX: Final = 3  # of one request, in a row: one that ends its runner each time must not use up all its starts
REACH_S_MAX: Final = 10.0  # of trying to connect to heads that are said to be ready; waiting for one is not counted
SPACING_S: Final = 0.25  # before the next attempt
SILENCE_S: Final = 1.0  # of a head, then we look whether it can speak
LOST_S: Final = MachineSettings().lost_ms / 1000  # a node that is unheard for less may go on with its work
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
        self._heads = Heads(credentials, self._start)
        self._ending = Ending()

    async def __aenter__(self) -> Self:
        await self._readers.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._readers.cancel_scope.cancel()
        return await self._readers.__aexit__(kind, error, trace)

    def leave(self) -> None:
        """Ends each answer, whatever it waits for, and all that come later: this node is being stopped, and the end of
        its connections would not tell a client why.
        """
        self._ending.tell("This node is being stopped; send the request to another one.", GONE)

    def _start(self, reader: Reader) -> None:
        self._readers.start_soon(reader)

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
            async with aclosing(self._answer(request)) as events:
                while True:
                    with self._ending.ends_waits():
                        event = await anext(events)
                    yield event
        except StopAsyncIteration:
            return
        except RefusedError as refused:
            _log.info("a request for %s was refused (%d)", request.model_id, refused.status)
            yield GenerationFailed(refused.message, refused.status, param=refused.param)

    async def _answer(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """The same. Raises `RefusedError`."""
        request = with_account(request, self._choosing.state().node_id)
        await check_constraint(request.sampling)
        instance = await self._choosing.ready(request.model_id, request.account)
        check_bias(request.sampling, instance.card)
        text = await self._texts.of(instance.card)
        token_ids = await asyncio.to_thread(text.prompt_ids, request.messages)
        instance = self._choosing.roomier(instance, len(token_ids) + 1)
        progress = begin(request, text, token_ids, instance)
        while not progress.done:
            try:
                async with aclosing(self._attempt(instance, progress)) as events:
                    async for event in events:
                        yield event
            except HeadLostError as lost:
                instance = await self._go_on(progress, instance, lost)

    async def _attempt(self, instance: Instance, progress: Progress) -> AsyncGenerator[GenerationEvent, None]:
        """What one head adds to the answer. Raises `HeadLostError` if it can't go on to the end, `RefusedError`."""
        instance, connection = await self._reach(instance, progress)
        async with connection.admitted(progress.admit) as stream:
            while not progress.done:
                event = await self._next(stream, instance, progress)
                if isinstance(event, Broken) and event.status in PASSING:
                    raise HeadLostError(event.message)
                for each in progress.take(event):
                    yield each

    async def _reach(self, instance: Instance, progress: Progress) -> tuple[Instance, HeadConnection]:
        """The connection to the head of `instance`, or of another. Raises `RefusedError`.

        The cluster notices only after seconds that a head is gone; until then it is tried again.
        """
        left_s, unreached = REACH_S_MAX, set[InstanceId]()
        while True:
            begun_s = time.monotonic()
            try:
                return instance, await self._connect(instance)
            except HeadLostError as lost:
                await asyncio.sleep(SPACING_S)
                left_s -= time.monotonic() - begun_s
                if left_s <= 0:
                    raise RefusedError(f"{lost} Send the request again.", GONE) from None
                unreached.add(instance.instance_id)
                instance = await self._another(progress, needs_of(progress, instance, unreached), lost)

    async def _another(self, progress: Progress, needs: Needs, lost: HeadLostError) -> Instance:
        """One that can go on, be it the same. Raises `RefusedError`."""
        account = progress.admit.account
        try:
            return await self._choosing.ready(needs.card.model_id, account, needs, has_begun=progress.has_begun)
        except RefusedError as refused:
            raise RefusedError(f"{lost} {refused.message}", refused.status) from None

    async def _next(self, stream: HeadStream, instance: Instance, progress: Progress) -> HeadEvent:
        """What the head says next. Raises `HeadLostError`.

        A machine that is switched off or asleep says nothing, and closes nothing: a silent head is looked at. One whose
        nodes are unheard for a moment may still answer, and would lose its place in the queue, or what it computed.
        """
        lost_since_s: float | None = None
        while True:
            try:
                async with asyncio.timeout(SILENCE_S):
                    return await stream.next()
            except TimeoutError:
                loss, now_s = self._choosing.loss(instance, needs_of(progress, instance)), time.monotonic()
                lost_since_s = (lost_since_s or now_s) if loss else None
                if loss and not (loss.may_pass and now_s - (lost_since_s or now_s) < LOST_S):
                    raise HeadLostError(loss.reason) from None

    async def _go_on(self, progress: Progress, instance: Instance, lost: HeadLostError) -> Instance:
        """Where the next attempt is made. Raises `RefusedError` if it was tried often enough."""
        if progress.tries >= TRIES_MAX:
            message = f"{lost} That happened {TRIES_MAX} times in a row, so the request is given up; send it again."
            raise RefusedError(message, GONE)
        _log.warning("an answer of %s broke off, and goes on where it stopped: %s", instance.card.model_id, lost)
        progress.begin_next_attempt()
        await asyncio.sleep(SPACING_S)
        return await self._another(progress, needs_of(progress, instance), lost)

    async def _connect(self, instance: Instance) -> HeadConnection:
        """Raises `HeadLostError`."""
        addresses = routing.head_addresses(self._choosing.state(), instance)
        if not addresses:
            raise HeadLostError(f"The head of {instance.card.model_id} has gone.")
        return await self._heads.connect(HeadPlace(instance.instance_id, instance.stages[0].node_id, addresses))


def with_account(request: GenerationRequest, asked_at: NodeId) -> GenerationRequest:
    """Without a key: whoever sits at this node."""
    return msgspec.structs.replace(request, account=request.account or f"node {asked_at}")


def begin(request: GenerationRequest, text: ModelText, token_ids: list[int], instance: Instance) -> Progress:
    """A request that can be sent to the head of `instance`. Raises `RefusedError`."""
    seed = secrets.randbits(SEED_BITS) if request.seed is None else request.seed
    stop_token_ids = tuple(sorted(text.stop_token_ids))
    admit = Admit(
        request_id=RequestId(uuid.uuid4().hex),
        attempt=FIRST_ATTEMPT,
        token_ids=tuple(token_ids),
        prompt_length=len(token_ids),
        sampling=msgspec.structs.replace(
            request.sampling, seed=seed, logit_bias=_bias(request, stop_token_ids, instance)
        ),
        token_count_max=token_count_max(request, len(token_ids), instance),
        stop_token_ids=stop_token_ids,
        account=request.account,
    )
    answer = AnswerText(IncrementalDecoder(text.token_bytes), StopStrings(request.stop), len(token_ids), Names(text))
    return Progress(admit, answer, time.monotonic)


def _bias(request: GenerationRequest, stop_token_ids: tuple[int, ...], instance: Instance) -> dict[int, float]:
    """What was asked for; and an end that may not come is never picked. A tokenizer may know ids that no logit has."""
    ends = [each for each in stop_token_ids if each < instance.card.vocabulary_size]
    return request.sampling.logit_bias | dict.fromkeys(ends if request.without_end else (), -math.inf)


def needs_of(progress: Progress, instance: Instance, unreached: Collection[InstanceId] = ()) -> Needs:
    """What another instance must have to go on where `instance` is left."""
    admit = progress.admit
    room = min(len(admit.token_ids) + 1, instance.context_length)  # its end may be all that is missing
    whole_room = admit.prompt_length + admit.token_count_max
    ways = instance.exact, instance.quantize, instance.kv_cache
    return Needs(instance.card, room, whole_room, *ways, frozenset(unreached))


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
            MESSAGES,
        )
    return room if request.token_count_max is None else min(room, request.token_count_max)
