"""Keeps what sampling must know of each slot, at the last stage: its settings and the tokens that penalties count."""

from covey.engine.contract import EngineError, Logits
from covey.engine.plan import SamplingStart, StepOutcome, StepPlan
from covey.engine.sampling import History, Row, pick, without
from covey.schema.generation import Sampling


def is_penalized(sampling: Sampling) -> bool:
    """Whether the tokens so far matter to the next one's choice."""
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


class SlotSampling:
    """The sampling of one request."""

    def __init__(self, start: SamplingStart) -> None:
        self._start = start
        self._history: History | None = None  # made with the first logits, which tell the vocabulary's size

    def next_token(self, logits: Row, position: int) -> int:
        sampling = self._start.sampling
        if not is_penalized(sampling):
            return pick(without(logits, sampling.banned_ids), sampling, position)
        history = self._history = self._history or History(
            logits.size, self._start.prompt_ids, self._start.generated_ids
        )
        token_id = pick(without(history.penalize(logits, sampling), sampling.banned_ids), sampling, position)
        history.add(token_id)
        return token_id


class Sampler:
    """Turns a step's logits into its outcome."""

    def __init__(self) -> None:
        self._slots: dict[int, SlotSampling] = {}

    def sample(self, plan: StepPlan, logits: Logits) -> StepOutcome:
        for slot in plan.released:
            self._slots.pop(slot, None)
        for start in plan.begun:
            self._slots[start.slot] = SlotSampling(start)
        token_ids: list[int | None] = []
        failure = ""
        wanting = [piece for piece in plan.pieces if piece.wants_logits]
        for piece, row in zip(wanting, logits, strict=True):
            try:
                token_ids.append(self._slots[piece.slot].next_token(row, piece.position + piece.token_count))
            except EngineError as error:
                token_ids.append(None)
                failure = str(error)
        return StepOutcome(plan.step, tuple(token_ids), failure)
