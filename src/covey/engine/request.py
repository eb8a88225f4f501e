"""One request as the scheduler sees it: its tokens, how far they are planned, and when it must be refused or ends."""

from dataclasses import dataclass, field
from typing import Final

from covey.engine.lookup import Lookup
from covey.schema.generation import Admit, Broken, Ended, FinishReason, Queued, Timings
from covey.schema.ids import RequestId

Key = tuple[int, RequestId, int]  # owner, request, attempt
NO_SLOT: Final = -1  # it waits for one


@dataclass
class Request:
    owner: int  # the connection that it came by
    admit: Admit
    arrived: float  # seconds, as are the next two
    begun: float | None = None  # its first step was planned
    answered: float | None = None  # its first token came
    tokens: list[int] = field(init=False)  # prompt and generated
    slot: int = NO_SLOT
    cached: int = 0  # tokens that its slot held when it got it, or that were copied to it
    sent: int = 0  # tokens that are planned already: their keys and values are cached, or will be
    told: tuple[int, int] | None = None  # its place in the queue, as its client knows it
    ended: bool = False
    lookup: Lookup = field(default_factory=Lookup)

    def __post_init__(self) -> None:
        self.tokens = list(self.admit.token_ids)

    @property
    def key(self) -> Key:
        return self.owner, self.admit.request_id, self.admit.attempt

    @property
    def account(self) -> str:
        return self.admit.account

    @property
    def has_begun(self) -> bool:
        """Whether an earlier attempt brought a part of its answer."""
        return len(self.admit.token_ids) > self.admit.prompt_length

    @property
    def completion_tokens(self) -> int:
        """Generated tokens, those of earlier attempts included."""
        return len(self.tokens) - self.admit.prompt_length

    @property
    def is_pending(self) -> bool:
        """Whether there is something to compute that no step in flight computes."""
        return self.sent < len(self.tokens)

    @property
    def is_decoding(self) -> bool:
        return self.answered is not None

    @property
    def may_guess(self) -> bool:
        """Whether what is picked depends on the logits alone, and nothing more is to be told of it."""
        sampling = self.admit.sampling
        return sampling.constraint is None and sampling.top_logprobs is None

    def room_for_guesses(self, context_length: int) -> int:
        """How many there is room for in the context and in what was asked for."""
        if not self.may_guess:
            return 0
        return min(context_length - len(self.tokens) - 1, self.admit.token_count_max - self.completion_tokens - 1)

    def finish_reason(self, context_length: int) -> FinishReason | None:
        """Why it is complete with the tokens that it has, if it is."""
        if self.completion_tokens > 0 and self.tokens[-1] in self.admit.stop_token_ids:
            return FinishReason.STOP
        if self.completion_tokens >= self.admit.token_count_max or len(self.tokens) >= context_length:
            return FinishReason.LENGTH
        return None

    def end(self, reason: FinishReason, now: float) -> Ended:
        admit = self.admit
        return Ended(admit.request_id, admit.attempt, reason, self.completion_tokens, self._timings(now))

    def broken(self, message: str, status: int, retry_after_seconds: int = 0) -> Broken:
        return Broken(self.admit.request_id, self.admit.attempt, message, status, retry_after_seconds)

    def queued(self, position: int, waiting_count: int) -> Queued:
        return Queued(self.admit.request_id, self.admit.attempt, position, waiting_count)

    def _timings(self, now: float) -> Timings:
        begun = now if self.begun is None else self.begun
        answered = now if self.answered is None else self.answered
        return Timings(1000 * (begun - self.arrived), 1000 * (answered - begun), 1000 * (now - answered))


def refusal(admit: Admit, context_length: int, vocabulary_size: int) -> str | None:
    """Why no engine of this size can run `admit`, in one sentence. `vocabulary_size` 0: unknown."""
    if not 0 < admit.prompt_length <= len(admit.token_ids):
        return "The prompt is empty; send at least one token."
    if admit.prompt_length >= context_length:
        return (
            f"The prompt has {admit.prompt_length} tokens, but the context holds {context_length} with the answer;"
            " shorten the prompt or place the model with a longer context."
        )
    lowest, highest = min(admit.token_ids), max(admit.token_ids)
    if lowest < 0 or (vocabulary_size and highest >= vocabulary_size):
        odd = lowest if lowest < 0 else highest
        return (
            f"The prompt holds token id {odd}, which the model does not know; tokenise it with the model's tokenizer."
        )
    return None
