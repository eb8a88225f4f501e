"""Two hundred requests share the slots of a real engine, and each is answered as it would have been alone.

Scheduler, engine and sampler as a runner joins them, in exact mode, where a token's logits hardly depend on what is
computed beside it: batching, chunks, what slots still held, guesses and stages must leave no trace in any answer.
"""

import random
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tiny_llama import LAYERS, VOCABULARY, write_tiny_llama

from covey.engine.contract import ALONE, Piece
from covey.engine.onnx.stage import OnnxStage
from covey.engine.plan import StepOutcome
from covey.engine.sampler import Sampler
from covey.engine.scheduler import Events, Scheduler
from covey.engine.waiting import QUEUE_MAX
from covey.schema.generation import Admit, Cancel, Ended, FinishReason, TokenSampled
from covey.schema.model import Shard
from tests.engine.harness import make_admit, make_spec, sampled

REQUESTS = 200
SLOTS = 4
CONTEXT = 384  # more than one chunk of a prompt
STEMS = [np.random.default_rng(stem).integers(0, VOCABULARY, CONTEXT).tolist() for stem in range(3)]
TIE = 1e-4  # of the logits' spread: a gap below it is decided by rounding


def load(path: Path, start: int, end: int, slots: int) -> OnnxStage:
    stage = OnnxStage()
    spec = make_spec(
        engine="onnx",
        engine_options={"exact": "1"},
        model_path=str(path),
        shard=Shard(start, end, LAYERS),
        context_length=CONTEXT,
        slot_count=slots,
    )
    stage.load(spec, lambda _: None, ALONE)
    return stage


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", {"token_embd": "Q8_0"}, default="Q4_1")


@pytest.fixture(scope="module")
def alone(tiny) -> OnnxStage:
    return load(tiny, 0, LAYERS, 1)


@dataclass
class Runner:
    """What the processes of a pipeline do, one step after another, with as many steps in flight as there are stages."""

    stages: list[OnnxStage]
    scheduler: Scheduler
    sampler: Sampler = field(default_factory=Sampler)
    flying: deque[StepOutcome] = field(default_factory=deque[StepOutcome])
    events: dict[str, list] = field(default_factory=dict[str, list])
    guessed: int = 0
    copied: int = 0
    together_most: int = 0

    def note(self, events: Events) -> None:
        for _, event in events:
            self.events.setdefault(event.request_id, []).append(event)

    def schedule(self) -> bool:
        planned = self.scheduler.schedule(0.0)
        if planned is None:
            return False
        values = planned.token_ids
        for stage in self.stages:
            values = stage.run(planned.plan.pieces, values)
        self.flying.append(self.sampler.sample(planned.plan, values))
        self.guessed += sum(piece.guess_count for piece in planned.plan.pieces)
        self.copied += sum(piece.copy is not None for piece in planned.plan.pieces)
        self.together_most = max(self.together_most, len(planned.plan.pieces))
        return True

    def learn(self) -> bool:
        if self.flying:
            self.note(self.scheduler.learn(self.flying.popleft(), 0.0))
            return True
        return False


def draw(dice: random.Random, number: int) -> Admit:
    """Some begin like others, some repeat themselves, so that slots are taken up again and tokens are guessed."""
    stem = dice.choice(STEMS)[: dice.choice([0, 0, 3, 40, 40, 300])]
    own = [dice.randrange(VOCABULARY) for _ in range(dice.randrange(1, 30))] * dice.choice([1, 1, 2])
    return make_admit(f"r{number}", [*stem, *own], dice.randrange(1, 40))


@pytest.mark.parametrize("bounds", [(0, LAYERS), (0, 1, LAYERS)], ids=["one stage", "two stages"])
def test_each_is_answered_as_alone_and_every_slot_comes_back(bounds, tiny, alone):
    stages = [load(tiny, start, end, SLOTS) for start, end in pairwise(bounds)]
    scheduler = Scheduler(slot_count=SLOTS, context_length=CONTEXT, stage_count=len(stages), vocabulary_size=VOCABULARY)
    runner, dice = Runner(stages, scheduler), random.Random(5)
    admits = [draw(dice, number) for number in range(REQUESTS)]
    coming, cancelled = deque(admits), set[str]()
    while coming or scheduler.running_count or runner.flying:
        is_crowded = len(coming) % 50 > 10  # between, each has the steps to itself, so that tokens are guessed
        may_come = scheduler.queued_count < QUEUE_MAX - 1 if is_crowded else not scheduler.running_count
        if coming and may_come and dice.random() < 0.3:
            runner.note(scheduler.admit(1, coming.popleft(), 0.0))
        if dice.random() < 0.01:
            name = dice.choice(list(runner.events) or ["none"])
            cancelled.add(name)
            runner.note(scheduler.cancel(1, Cancel(name, 0), 0.0))
        runner.schedule() if dice.random() < 0.5 else runner.learn()
    assert (scheduler.running_count, scheduler.queued_count) == (0, 0)
    assert sorted(slot.index for slot in scheduler._slots._free) == list(range(SLOTS))
    ends = [check(alone, admit, runner.events[admit.request_id]) for admit in admits]
    assert ends.count(FinishReason.LENGTH) > 0.8 * REQUESTS
    assert ends.count(FinishReason.CANCELLED) <= len(cancelled)
    assert runner.guessed
    assert runner.copied
    assert runner.together_most == SLOTS // len(stages)


def check(alone: OnnxStage, admit: Admit, events: list) -> FinishReason:
    """Its own tokens, each once and in order, and one end."""
    *_, end = events
    assert [event for event in events if isinstance(event, Ended)] == [end]
    positions = [event.position for event in events if isinstance(event, TokenSampled)]
    assert positions == list(range(admit.prompt_length, admit.prompt_length + len(positions)))
    said = sampled(events)
    wanted = min(admit.token_count_max, CONTEXT - admit.prompt_length)  # some fill their slot
    assert end.reason is FinishReason.CANCELLED or len(said) == wanted
    assert_says(alone, list(admit.token_ids), said)
    return end.reason


def assert_says(alone: OnnxStage, tokens: list[int], said: list[int]) -> None:
    """Up to where two tokens are as good."""
    computed = 0
    for token_id in said:
        piece = Piece(0, computed, len(tokens) - computed, wants_logits=True)
        [logits] = alone.run([piece], np.array(tokens[computed:], np.int64))
        if logits.argmax() != token_id:
            assert logits.max() - logits[token_id] < TIE * logits.std()
            return
        computed = len(tokens)
        tokens.append(token_id)
