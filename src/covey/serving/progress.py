"""What a head says about a request, as the events that its client sees. No I/O."""

from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from covey.schema.generation import (
    Admit,
    Broken,
    Ended,
    FinishReason,
    GenerationEvent,
    GenerationFailed,
    GenerationFinished,
    GenerationStarted,
    HeadEvent,
    Prefilled,
    PrefillProgressed,
    Queued,
    QueueProgressed,
    Timings,
    TokenSampled,
    Usage,
)
from covey.serving.answer import AnswerText, OutOfOrderError

FIRST_ATTEMPT: Final = 1
TOKENS_OF_A_GOOD_TRY: Final = 16  # what ends its runner each time gives fewer


class Progress:
    """One request, from its first admission to the last event. `clock` gives seconds.

    `admit` is that of the current attempt; `take` must be given the events of that one only. `tries` counts the
    attempts since the answer last went on for a while.
    """

    def __init__(self, admit: Admit, answer: AnswerText, clock: Callable[[], float]) -> None:
        self.admit = admit
        self._answer = answer
        self._clock = clock
        self._admitted_s = clock()
        self._answered_s: float | None = None  # the first token came
        self._cached_tokens = 0
        self._started = False
        self._told_before = 0  # tokens, by earlier attempts
        self.tries = 1
        self.done = False

    @property
    def has_begun(self) -> bool:
        """Whether a part of the answer has come."""
        return bool(self._answer.token_ids)

    def begin_next_attempt(self) -> None:
        """To be admitted again where it broke off."""
        token_count = len(self._answer.token_ids)
        self.tries = 1 if token_count - self._told_before >= TOKENS_OF_A_GOOD_TRY else self.tries + 1
        self._told_before = token_count
        prompt = self.admit.token_ids[: self.admit.prompt_length]
        token_ids = (*prompt, *self._answer.token_ids)
        self.admit = msgspec.structs.replace(self.admit, attempt=self.admit.attempt + 1, token_ids=token_ids)

    def take(self, event: HeadEvent) -> Iterable[GenerationEvent]:
        """The events that follow from what the head said."""
        if isinstance(event, Broken):
            yield self._fail(event.message, event.status, event.retry_after_s)
            return
        if not self._started:  # only now is it known that the head does not refuse it
            self._started = True
            yield GenerationStarted(self.admit.request_id, self.admit.prompt_length, self.admit.sampling.seed)
        match event:
            case Queued():
                position = event.position + 1
                yield QueueProgressed(position, max(event.waiting_requests, position))
            case Prefilled():
                if self.admit.attempt == FIRST_ATTEMPT:
                    self._cached_tokens = min(event.cached_tokens, self.admit.prompt_length)
                yield PrefillProgressed(event.processed_tokens, event.total_tokens)
            case TokenSampled():
                yield from self._take_token(event)
            case Ended():
                yield from self._end(event)

    def _take_token(self, sampled: TokenSampled) -> Iterable[GenerationEvent]:
        if self._answered_s is None:
            self._answered_s = self._clock()
        try:
            told = self._answer.push(sampled)
        except OutOfOrderError:
            yield self._fail("The model's head skipped a token, so the rest of the answer would be wrong.", 500)
            return
        if told:
            yield told
        if self._answer.stopped:
            yield self._finish(FinishReason.STOP, len(self._answer.token_ids), self._timings())

    def _end(self, ended: Ended) -> Iterable[GenerationEvent]:
        if ended.reason is FinishReason.CANCELLED:  # not by us: we no longer listen after we cancel
            yield self._fail("The request was cancelled by the model's head.", 503)
            return
        told = self._answer.finish()
        if told:
            yield told
        reason = FinishReason.STOP if self._answer.stopped else ended.reason
        is_whole = self.admit.attempt == FIRST_ATTEMPT  # the head has seen all of it
        yield self._finish(reason, ended.completion_tokens, ended.timings if is_whole else self._timings())

    def _finish(self, reason: FinishReason, completion_tokens: int, timings: Timings) -> GenerationFinished:
        self.done = True
        usage = Usage(self.admit.prompt_length, completion_tokens, self._cached_tokens)
        return GenerationFinished(reason, usage, timings)

    def _fail(self, message: str, status: int, retry_after_s: int = 0) -> GenerationFailed:
        self.done = True
        return GenerationFailed(message, status, retry_after_s)

    def _timings(self) -> Timings:
        """As measured here: where a stop string ends the answer, or several heads gave it, no head has the figures."""
        now = self._clock()
        answered = now if self._answered_s is None else self._answered_s
        return Timings(0.0, 1000 * (answered - self._admitted_s), 1000 * (now - answered))
