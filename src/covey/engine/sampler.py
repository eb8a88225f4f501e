"""Keeps what sampling must know of each slot, at the last stage: its settings, the tokens that penalties count, and
how far a constraint is satisfied.
"""

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from covey.engine.contract import EngineError, Logits, Piece
from covey.engine.likelihood import likelihood
from covey.engine.plan import Remark, SamplingStart, StepOutcome, StepPlan
from covey.engine.sampling import History, Mask, Row, pick
from covey.schema.generation import Likelihood, Sampling

if TYPE_CHECKING:
    from covey.engine.constraining import Constraining, Guide

Verdicts = dict[int, Mask | Remark]  # of the slots that are held to a constraint


def is_penalized(sampling: Sampling) -> bool:
    """Whether the tokens so far matter to the next one's choice."""
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


class SlotSampling:
    """The sampling of one request."""

    def __init__(self, start: SamplingStart, guide: "Guide | None" = None) -> None:
        self.guide = guide
        self._start = start
        self._bias = Bias(start.sampling.logit_bias) if start.sampling.logit_bias else None
        self._history: History | None = None  # made with the first logits, which tell the vocabulary's size

    def next_token(self, logits: Row, position: int, allowed: Mask | None) -> int:
        """Raises `EngineError`."""
        sampling = self._start.sampling
        weighed = self._bias.add(logits) if self._bias else logits
        if is_penalized(sampling):
            weighed = self._counted(logits.size).penalize(weighed, sampling)
        if allowed is not None:
            weighed = np.where(allowed, weighed, np.float32(-np.inf))
        token_id = pick(weighed, sampling, position)
        if self._history:
            self._history.add(token_id)
        if self.guide:
            self.guide.follow(token_id)
        return token_id

    def likelihood(self, logits: Row, token_id: int) -> Likelihood | None:
        """What is to be told of a token that was picked by these logits."""
        count = self._start.sampling.top_logprobs
        return None if count is None else likelihood(logits, token_id, count)

    def leave(self) -> None:
        if self.guide:
            self.guide.leave()

    def _counted(self, vocabulary_size: int) -> History:
        start = self._start
        self._history = self._history or History(vocabulary_size, start.prompt_ids, start.generated_ids)
        return self._history


class Bias:
    """What a request wants added to some tokens' logits."""

    def __init__(self, values: dict[int, float]) -> None:
        self._ids: NDArray[np.int64] = np.array([*values], np.int64)
        self._values = np.array([*values.values()], np.float32)

    def add(self, logits: Row) -> Row:
        """A copy of `logits` with the bias. Raises `EngineError`."""
        if not 0 <= self._ids.min() <= self._ids.max() < logits.size:
            raise EngineError(f"The logit bias names a token id that is not below {logits.size}.")
        biased = logits.copy()
        biased[self._ids] += self._values
        return biased


class Sampler:
    """Turns a step's logits into its outcome. The model's file has the tokenizer that constraints need."""

    def __init__(self, model_path: str = "", thread_count: int = 1) -> None:
        self._slots: dict[int, SlotSampling] = {}
        self._model_path = model_path
        self._thread_count = thread_count

    def sample(self, plan: StepPlan, logits: Logits) -> StepOutcome:
        self._turn_over(plan, logits.shape[1])
        wanting = [piece for piece in plan.pieces if piece.wants_logits]
        verdicts = self._judge(wanting, logits.shape[1])
        token_ids: list[int | None] = []
        remarks: dict[int, Remark] = {}
        followers: dict[int, tuple[int, ...]] = {}
        start = 0
        for place, piece in enumerate(wanting):
            rows = logits[start : start + piece.row_count]
            start += piece.row_count
            token_id, remark = self._pick(piece, rows[0], verdicts.get(piece.slot))
            token_ids.append(token_id)
            if remark is not None:
                remarks[place] = remark
            if piece.guess_count and token_id is not None:
                followers[place] = self._follow(piece, rows, token_id, plan.guesses[piece.slot])
        failure = next((remark.failure for remark in remarks.values() if remark.failure), "")
        return StepOutcome(plan.step, tuple(token_ids), failure, remarks, followers)

    def _turn_over(self, plan: StepPlan, vocabulary_size: int) -> None:
        """Forgets the slots that are free, and learns of those that begin."""
        for slot in plan.released:
            if left := self._slots.pop(slot, None):
                left.leave()
        for start in plan.begun:
            constraint = start.sampling.constraint
            guide = constraint and self._constraining.begin(constraint, start.generated_ids, vocabulary_size)
            self._slots[start.slot] = SlotSampling(start, guide)

    @cached_property
    def _constraining(self) -> "Constraining":
        from covey.engine.constraining import Constraining  # noqa: PLC0415 - its library is large, and rarely used

        return Constraining(self._model_path, self._thread_count)

    def _judge(self, wanting: list[Piece], vocabulary_size: int) -> Verdicts:
        guides = {piece.slot: guide for piece in wanting if (guide := self._slots[piece.slot].guide)}
        return self._constraining.rule(guides, vocabulary_size) if guides else {}

    def _follow(self, piece: Piece, rows: Logits, token_id: int, guesses: tuple[int, ...]) -> tuple[int, ...]:
        """What is picked after `token_id`, as long as what was guessed is what was picked.

        Logits by which nothing can be picked end it: the next step has them again, and tells.
        """
        slot = self._slots[piece.slot]
        position = piece.position + piece.token_count - piece.guess_count
        found: list[int] = []
        for guess, row in zip(guesses, rows[1:], strict=True):
            if guess != (found[-1] if found else token_id):
                break
            try:
                found.append(slot.next_token(row, position + 1 + len(found), None))
            except EngineError:
                break
        return tuple(found)

    def _pick(self, piece: Piece, logits: Row, verdict: Mask | Remark | None) -> tuple[int | None, Remark | None]:
        if isinstance(verdict, Remark):
            return None, verdict
        slot = self._slots[piece.slot]
        try:
            token_id = slot.next_token(logits, piece.position + piece.token_count - piece.guess_count, verdict)
        except EngineError as error:
            return None, Remark(str(error))
        told = slot.likelihood(logits, token_id)
        return token_id, told and Remark(likelihood=told)
