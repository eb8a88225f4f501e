"""One request's life on the node that holds its HTTP connection: from messages to the last word of the answer.

Pick an instance, write the prompt, send it to the head, turn what comes back into text, and leave nothing running:
the request is cancelled at the head whenever its iterator is closed before the end. Prompts are never logged.
"""

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from types import TracebackType
from typing import Final, Self

import anyio
import msgspec
from anyio.abc import TaskGroup

from covey.control import routing
from covey.control.runner_table import LOADED_STATES
from covey.schema.cluster import ClusterState, Instance, InstancePhase, Refused
from covey.schema.generation import Admit, GenerationEvent, GenerationFailed, GenerationRequest
from covey.schema.ids import InstanceId, ModelId, RequestId
from covey.schema.model import ModelCard
from covey.schema.runner import RunnerState
from covey.schema.trust import Credentials
from covey.serving.answer import AnswerText
from covey.serving.head import HeadConnection, HeadLostError, HeadPlace, Heads
from covey.serving.model_text import ModelTexts
from covey.serving.progress import Progress
from covey.serving.refusal import RefusedError
from covey.text.detokenize import IncrementalDecoder
from covey.text.stop import StopStrings

READY_S_MAX: Final = 120.0  # how long a request waits for a model that is placed and still loading
WATCH_S_MAX: Final = 60.0  # one wait for a change of the cluster; then we look again
SEED_BITS: Final = 63
GONE: Final = 503  # HTTP: try again, another instance may be up
FIRST_ATTEMPT: Final = 1
HAS_FILE: Final = (RunnerState.LOADING, *LOADED_STATES)  # of a runner: its model's file lies on this node

_log = logging.getLogger(__name__)


class Prepared(msgspec.Struct, frozen=True):
    """A request that can be sent to a head."""

    instance: Instance
    admit: Admit
    answer: AnswerText


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
        self._state = state
        self._wait_changed = wait_changed
        self._texts = texts
        self._readers: TaskGroup = anyio.create_task_group()
        self._heads = Heads(credentials, self._start_reader)

    async def __aenter__(self) -> Self:
        await self._readers.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._readers.cancel_scope.cancel()
        return await self._readers.__aexit__(kind, error, trace)

    def _start_reader(self, connection: HeadConnection) -> None:
        self._readers.start_soon(connection.read)

    async def read_ahead(self) -> None:
        """For ever: reads the text of each model that this node has a part of as soon as its file is here, so that
        the first request is answered, or refused, without that wait. Large vocabularies take seconds.
        """
        begun: set[InstanceId] = set()
        async with anyio.create_task_group() as tasks:
            while True:
                state = self._state()
                begun &= {instance.instance_id for instance in state.instances}
                for instance in held(state):
                    if instance.instance_id not in begun:
                        begun.add(instance.instance_id)
                        tasks.start_soon(self._read, instance.card)
                await self._wait_changed(state.revision, WATCH_S_MAX)

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
            prepared = await self._prepare(request)
            connection = await self._connect(prepared.instance)
            progress = Progress(prepared.admit, prepared.answer, time.monotonic)
            async with connection.admitted(prepared.admit) as stream:
                while not progress.done:
                    for event in progress.take(await stream.next()):
                        yield event
        except RefusedError as refused:
            _log.info("a request for %s was refused (%d)", request.model_id, refused.status)
            yield GenerationFailed(refused.message, refused.status)
        except HeadLostError as lost:
            _log.warning("a request for %s is lost: %s", request.model_id, lost)
            yield GenerationFailed(f"{lost} Send the request again.", GONE)

    async def _prepare(self, request: GenerationRequest) -> Prepared:
        """Raises `RefusedError`."""
        instance = await self._ready_instance(request.model_id)
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
        answer = AnswerText(IncrementalDecoder(text.token_bytes), StopStrings(request.stop), admit)
        return Prepared(instance, admit, answer)

    async def _ready_instance(self, model_id: ModelId) -> Instance:
        """An instance that can answer; waits while one is on its way. Raises `RefusedError`."""
        deadline = time.monotonic() + READY_S_MAX
        while True:
            state = self._state()
            picked = routing.pick(state, model_id)
            if isinstance(picked, Instance):
                return picked
            left = deadline - time.monotonic()
            if left <= 0 or not is_coming(state, model_id):
                raise refusal(picked)
            await self._wait_changed(state.revision, left)

    async def _connect(self, instance: Instance) -> HeadConnection:
        """Raises `HeadLostError`."""
        addresses = routing.head_addresses(self._state(), instance)
        if not addresses:
            raise HeadLostError(f"The head of {instance.card.model_id} has gone.")
        return await self._heads.connect(HeadPlace(instance.instance_id, instance.stages[0].node_id, addresses))


def held(state: ClusterState) -> list[Instance]:
    """The instances of which this node has a part, and so the model's file."""
    reports = [member.report for member in state.members if member.node_id == state.node_id and member.report]
    runners = [runner for report in reports for runner in report.runners if runner.state in HAS_FILE]
    ids = {runner.instance_id for runner in runners}
    return [instance for instance in state.instances if instance.instance_id in ids]


def is_coming(state: ClusterState, model_id: ModelId) -> bool:
    """Whether an instance of the model may become ready by itself."""
    placed = [instance for instance in state.instances if instance.card.model_id == model_id]
    failed = InstancePhase.FAILED
    return any(routing.instance_status(state, instance).phase is not failed for instance in placed)


def refusal(refused: Refused) -> RefusedError:
    hint = " POST /place_instance does the same." if refused.status == 404 else ""  # noqa: PLR2004 - HTTP
    return RefusedError(refused.reason + hint, refused.status)


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
