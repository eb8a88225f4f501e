"""The scheduler keeps every request apart, shares the steps fairly, and gives back all that it took."""

import random
import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covey.engine.contract import Copy, Piece
from covey.engine.drafting import Drafted, Drafter
from covey.engine.plan import PlannedStep, Remark, StepOutcome
from covey.engine.scheduler import Events, Scheduler, StepOrderError
from covey.engine.slots import shared_length
from covey.engine.waiting import QUEUE_MAX
from covey.schema.generation import (
    PREFILL_CHUNK_TOKENS,
    Admit,
    Broken,
    Cancel,
    Constraint,
    ConstraintKind,
    Ended,
    FinishReason,
    HeadEvent,
    Prefilled,
    Queued,
    Sampling,
    TokenSampled,
)
from covey.schema.ids import RequestId
from tests.engine.harness import make_admit, sampled

STOP = 0
Model = Callable[[Sequence[int]], int]


def make_scheduler(
    slot_count: int = 2,
    context_length: int = 2000,
    stage_count: int = 1,
    *,
    looks_up: bool = True,
    drafter: Drafter | None = None,
) -> Scheduler:
    return Scheduler(
        slot_count=slot_count,
        context_length=context_length,
        stage_count=stage_count,
        vocabulary_size=1000,
        looks_up=looks_up,
        drafter=drafter,
    )


def next_token(sequence: Iterable[int]) -> int:
    """What the "model" says after `sequence`: anything may follow, and about one in thirty is a stop token."""
    state = 7
    for token_id in sequence:
        state = (state * 1_000_003 + token_id + 1) % 2_147_483_647
    return 0 if state % 30 == 0 else 1 + state % 997


def quoted_token(sequence: Sequence[int]) -> int:
    """What another one says: mostly what came thirty tokens before, so that much can be guessed, some of it wrong."""
    is_new = len(sequence) < 30 or next_token(sequence) % 12 == 0
    return next_token(sequence) if is_new else sequence[-30]


@dataclass
class Knowing:
    """A drafter that says what the model says, but for one token in so many, in no time."""

    says: Model
    wrong: int = 20
    asked: list[list[int]] = field(default_factory=list[list[int]])

    def guess(self, tokens: Sequence[int], most: int, sampling: Sampling) -> Drafted:
        assert sampling.seed == 0
        self.asked.append([*tokens])
        said = [*tokens]
        while len(said) < len(tokens) + most:
            said.append(self.says(said) if len(said) % self.wrong else 1)
        return Drafted(tuple(said[len(tokens) :]), 0.0, 0.0)


def plain_run(admit: Admit, context_length: int, says: Model) -> tuple[list[int], FinishReason]:
    """The dumb twin: one request, alone, without a cache."""
    tokens = list(admit.token_ids)
    while True:
        if len(tokens) - admit.prompt_length >= admit.token_count_max or len(tokens) >= context_length:
            return tokens, FinishReason.LENGTH
        token_id = says(tokens)
        tokens.append(token_id)
        if token_id in admit.stop_token_ids:
            return tokens, FinishReason.STOP


@dataclass
class World:
    """Runs what the scheduler plans, as a pipeline would: first in, first out, with a cache for each slot."""

    scheduler: Scheduler
    says: Model = next_token
    slots: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    flying: deque[StepOutcome] = field(default_factory=deque[StepOutcome])
    sampling_slots: set[int] = field(default_factory=set[int])
    events: list[tuple[int, HeadEvent]] = field(default_factory=list[tuple[int, HeadEvent]])
    plans: list[PlannedStep] = field(default_factory=list[PlannedStep])
    now: float = 0.0

    def note(self, events: Events) -> None:
        self.events += events

    def schedule(self) -> bool:
        self.now += 0.01
        planned = self.scheduler.schedule(self.now)
        if planned is None:
            return False
        self.plans.append(planned)
        self.sampling_slots -= set(planned.plan.released)
        self.sampling_slots |= {start.slot for start in planned.plan.begun}
        ids: list[int] = planned.token_ids.tolist()
        token_ids: list[int | None] = []
        followers: dict[int, tuple[int, ...]] = {}
        for piece in planned.plan.pieces:
            chunk, ids = ids[: piece.token_count], ids[piece.token_count :]
            assert piece.guess_count == len(planned.plan.guesses.get(piece.slot, ()))
            token_id, *more = self.run_piece(piece, chunk) or [None]
            if more:
                followers[len(token_ids)] = tuple(more)
            token_ids += [token_id] if piece.wants_logits else []
        assert not ids
        self.flying.append(StepOutcome(planned.plan.step, tuple(token_ids), followers=followers))
        return True

    def run_piece(self, piece: Piece, chunk: list[int]) -> list[int]:
        """The token that follows, and as many more as were guessed right before them."""
        cache = self.slots.setdefault(piece.slot, [])
        if piece.copy:
            assert piece.copy.start <= len(cache)
            cache[piece.copy.start :] = self.slots[piece.copy.source][piece.copy.start : piece.position]
        assert piece.position <= len(cache), "a step must begin where the cache reaches"
        assert len(chunk) == piece.token_count > 0
        cache[piece.position :] = chunk
        if not piece.wants_logits:
            return []
        assert piece.slot in self.sampling_slots
        said: list[int] = []
        for end in range(len(cache) - piece.guess_count, len(cache) + 1):
            said.append(self.says(cache[:end]))
            if end < len(cache) and said[-1] != cache[end]:
                break
        return said

    def learn(self) -> bool:
        if not self.flying:
            return False
        self.note(self.scheduler.learn(self.flying.popleft(), self.now))
        return True

    def settle(self) -> None:
        while self.schedule() or self.learn():
            pass

    def of(self, name: str) -> list[HeadEvent]:
        return [event for _, event in self.events if event.request_id == name]

    def admit(self, admit: Admit, owner: int = 1) -> None:
        self.note(self.scheduler.admit(owner, admit, self.now))


def assert_nothing_is_left(scheduler: Scheduler, slot_count: int) -> None:
    assert (scheduler.running_count, scheduler.queued_count) == (0, 0)
    assert sorted(slot.index for slot in scheduler._slots._free) == list(range(slot_count))
    assert not scheduler._in_flight


def ids(seed: int, count: int) -> list[int]:
    return [1 + (seed * 131 + place * 17) % 900 for place in range(count)]


# ---- what always holds ----


@given(
    st.integers(0, 2**32),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([next_token, quoted_token]),
    st.sampled_from([None, 2, 20]),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_requests_that_come_and_go_at_any_time_stay_apart(
    seed: int, slot_count: int, stage_count: int, says: Model, wrong: int | None
) -> None:
    """Admissions, cancellations and lost connections in any order, with steps in flight: each request that ends by
    itself got exactly its own tokens, in order; no slot is lost; every request ends once.
    """
    world_random = random.Random(seed)
    context_length = 700
    drafter = Knowing(says, wrong) if wrong else None
    world = World(make_scheduler(slot_count, context_length, stage_count, drafter=drafter), says)
    admits: dict[str, Admit] = {}
    owners: dict[str, int] = {}
    stems = [ids(stem, 650) for stem in range(3)]  # shared beginnings, so that slots are taken up again
    for turn in range(80):
        match world_random.randrange(8):
            case 0 | 1:
                stem = world_random.choice(stems)[: world_random.choice([1, 5, 40, 300, 600])]
                prompt = [*stem, *ids(turn + 7, world_random.randrange(0, 5))]
                name = f"r{turn}"
                admit = make_admit(name, prompt, world_random.randrange(1, 40), stop_token_ids=(STOP,))
                admits[name], owners[name] = admit, world_random.randrange(3)
                world.admit(admit, owners[name])
            case 2 if admits:
                name = world_random.choice(list(admits))
                world.note(world.scheduler.cancel(owners[name], Cancel(RequestId(name), 0), world.now))
            case 3 if world_random.random() < 0.1:
                world.note(world.scheduler.drop(world_random.randrange(3), world.now))
            case 4 | 5:
                world.schedule()
            case _:
                world.learn()
        assert len(world.flying) <= 2 * stage_count
    world.settle()
    assert_nothing_is_left(world.scheduler, slot_count)
    for name, admit in admits.items():
        check_answer(admit, owners[name], world, context_length)


def check_answer(admit: Admit, owner: int, world: World, context_length: int) -> None:
    events = world.of(admit.request_id)
    assert {home for home, event in world.events if event.request_id == admit.request_id} == {owner}
    ends = [event for event in events if isinstance(event, Ended)]
    assert len(ends) == 1
    assert events[-1] is ends[0]
    tokens, reason = plain_run(admit, context_length, world.says)
    expected = tokens[admit.prompt_length :]
    shown = [token_id for token_id in expected if token_id != STOP]
    positions = [event.position for event in events if isinstance(event, TokenSampled)]
    assert positions == list(range(admit.prompt_length, admit.prompt_length + len(positions)))
    if ends[0].reason is FinishReason.CANCELLED:
        assert sampled(events) == shown[: len(positions)]
    else:
        assert (sampled(events), ends[0].reason, ends[0].completion_tokens) == (shown, reason, len(expected))


# ---- single rules ----


def test_a_prompt_is_prefilled_in_chunks_and_then_decoded() -> None:
    world = World(make_scheduler())
    world.admit(make_admit("a", ids(1, 2 * PREFILL_CHUNK_TOKENS + 10), 3))
    world.settle()
    counts = [[piece.token_count for piece in planned.plan.pieces] for planned in world.plans]
    assert counts == [[128], [128], [10], [1], [1]]
    wants = [planned.plan.pieces[0].wants_logits for planned in world.plans]
    assert wants == [False, False, True, True, True]
    progress = [event.processed_tokens for event in world.of("a") if isinstance(event, Prefilled)]
    assert progress == [128, 256, 266]


def quoting(count: int, **changes: Any) -> World:
    """One request whose answer quotes its prompt."""
    world = World(make_scheduler(**changes), quoted_token)
    world.admit(make_admit("a", ids(1, 60), count, stop_token_ids=()))
    world.settle()
    return world


def test_an_answer_that_quotes_takes_fewer_steps_and_is_the_same() -> None:
    world = quoting(200)
    tokens, _ = plain_run(make_admit("a", ids(1, 60), 200, stop_token_ids=()), 2000, quoted_token)
    assert sampled(world.of("a")) == tokens[60:]
    assert len(world.plans) < 120
    assert len(quoting(200, looks_up=False).plans) == 200


@pytest.mark.parametrize("count", range(195, 203))
def test_no_guess_leads_beyond_what_was_asked_for(count: int) -> None:
    world = quoting(count)
    assert len(sampled(world.of("a"))) == count
    last = world.plans[-1].plan.pieces[0]
    assert last.position + last.token_count <= 60 + count - 1


@pytest.mark.parametrize("context", range(195, 203))
def test_no_guess_leads_beyond_the_context(context: int) -> None:
    world = quoting(1000, context_length=context)
    assert 60 + len(sampled(world.of("a"))) == context
    assert max(each.position + each.token_count for plan in world.plans for each in plan.plan.pieces) < context


def test_nothing_is_guessed_where_others_share_the_step() -> None:
    world = World(make_scheduler(), quoted_token)
    for name in "ab":
        world.admit(make_admit(name, ids(1, 60), 100, stop_token_ids=()))
    world.settle()
    shared = [planned.plan for planned in world.plans if len(planned.plan.pieces) > 1]
    assert shared
    assert not any(plan.guesses for plan in shared)


@pytest.mark.parametrize("told", [{"top_logprobs": 0}, {"constraint": Constraint(ConstraintKind.REGEX, "a*", "regex")}])
def test_nothing_is_guessed_where_more_is_to_be_told_or_weighed(told: dict[str, Any]) -> None:
    world = World(make_scheduler(), quoted_token)
    world.admit(make_admit("a", ids(1, 60), 100, stop_token_ids=(), sampling=Sampling(**told)))
    world.settle()
    assert not any(planned.plan.guesses for planned in world.plans)


# ---- a draft model guesses ----


def drafted(admit: Admit, **changes: Any) -> tuple[World, Knowing]:
    """One request, whose tokens nobody could look up, with a draft model."""
    knowing = Knowing(next_token)
    world = World(make_scheduler(**({"drafter": knowing} | changes)))
    world.admit(admit)
    world.settle()
    return world, knowing


@pytest.mark.parametrize("stage_count", [1, 2])
@pytest.mark.parametrize("looks_up", [False, True])
def test_an_answer_that_is_drafted_takes_fewer_steps_and_is_the_same(stage_count: int, *, looks_up: bool) -> None:
    admit = make_admit("a", ids(1, 60), 200, stop_token_ids=())
    world, _ = drafted(admit, stage_count=stage_count, looks_up=looks_up)
    assert sampled(world.of("a")) == plain_run(admit, 2000, next_token)[0][60:]
    assert len(world.plans) < 100


@pytest.mark.parametrize("count", range(195, 203))
def test_no_draft_leads_beyond_what_was_asked_for_or_the_context(count: int) -> None:
    asked_for, _ = drafted(make_admit("a", ids(1, 60), count, stop_token_ids=()))
    held, _ = drafted(make_admit("a", ids(1, 60), 1000, stop_token_ids=()), context_length=60 + count)
    for world in (asked_for, held):
        assert len(sampled(world.of("a"))) == count
        assert max(each.position + each.token_count for plan in world.plans for each in plan.plan.pieces) < 60 + count


@pytest.mark.parametrize("stage_count", [1, 2])
def test_the_draft_rests_while_others_run(stage_count: int) -> None:
    """Over two stages each of two requests has a step to itself; the other would wait for the draft all the same."""
    knowing = Knowing(next_token)
    world = World(make_scheduler(drafter=knowing, stage_count=stage_count))
    for name, count in (("a", 60), ("b", 200)):
        world.admit(make_admit(name, ids(ord(name), 30), count, stop_token_ids=()))
    world.settle()
    assert knowing.asked
    assert all(tokens[:30] == ids(ord("b"), 30) and len(tokens) > 60 for tokens in knowing.asked)
    for name, count in (("a", 60), ("b", 200)):
        assert len(sampled(world.of(name))) == count


@pytest.mark.parametrize("told", [{"top_logprobs": 0}, {"constraint": Constraint(ConstraintKind.REGEX, "a*", "regex")}])
def test_the_draft_rests_where_more_is_to_be_told_or_weighed(told: dict[str, Any]) -> None:
    _, knowing = drafted(make_admit("a", ids(1, 60), 100, stop_token_ids=(), sampling=Sampling(**told)))
    assert not knowing.asked


def test_the_time_of_the_draft_is_none_of_the_steps() -> None:
    """A step begins when guessing is over: else a slow draft would make the model look slow, and so itself cheap."""

    class Slow(Knowing):
        def guess(self, tokens: Sequence[int], most: int, sampling: Sampling) -> Drafted:
            world.now += 10.0 * most
            return super().guess(tokens, most, sampling)._replace(guessing_s=10.0 * most)

    world = World(make_scheduler())
    drafter = Slow(next_token, wrong=1000)
    world.scheduler = make_scheduler(drafter=drafter)
    world.admit(make_admit("a", ids(1, 60), 600, stop_token_ids=()))
    while world.schedule():
        world.now += 1.0
        world.learn()
    assert not any(planned.plan.guesses for planned in world.plans)
    assert len(drafter.asked) <= 2, "it was tried, and once more at most"


def test_a_long_prompt_stalls_nobody_who_is_being_answered() -> None:
    world = World(make_scheduler())
    world.admit(make_admit("quick", ids(1, 3), 30))
    assert world.schedule()
    assert world.learn()
    world.admit(make_admit("long", ids(2, 1900), 3))
    for _ in range(8):
        world.schedule()
        world.learn()
    assert [planned.plan.pieces[0].token_count for planned in world.plans[1:]] == [1, 128] * 4


def test_prompts_take_turns() -> None:
    """A short question behind a long document is answered first."""
    world = World(make_scheduler())
    world.admit(make_admit("long", ids(1, 1500), 1))
    world.admit(make_admit("short", ids(2, 10), 1))
    world.settle()
    ends = [event.request_id for _, event in world.events if isinstance(event, Ended)]
    assert ends == ["short", "long"]


def test_one_stage_decodes_all_together() -> None:
    world = World(make_scheduler(slot_count=4))
    for name in "abcd":
        world.admit(make_admit(name, ids(ord(name), 5), 10))
    world.settle()
    assert max(len(planned.plan.pieces) for planned in world.plans) == 4
    assert len(world.plans) < 4 + 10 + 4  # prefills, decodes together, and those between the prefills


@pytest.mark.parametrize("stage_count", [2, 3])
def test_each_stage_has_a_group_of_its_own(stage_count: int) -> None:
    """With n stages the decoding requests are dealt into n groups in flight, and nobody is in two of them."""
    world = World(make_scheduler(slot_count=6, stage_count=stage_count))
    for name in "abcdef":
        world.admit(make_admit(name, ids(ord(name), 5), 40, stop_token_ids=()))
    for _ in range(30):
        while world.schedule():
            pass
        world.learn()
    in_flight = [planned.plan.pieces for planned in world.plans[-stage_count:]]
    slots = [piece.slot for pieces in in_flight for piece in pieces]
    assert len(slots) == len(set(slots)) == 6
    assert {len(pieces) for pieces in in_flight} == {6 // stage_count}


@pytest.mark.parametrize("stage_count", [2, 3])
def test_a_group_comes_to_be_of_neighbouring_slots(stage_count: int) -> None:
    """The engine reads the weights once for these. Prompts end one after the other, while others are in flight."""
    world = World(make_scheduler(slot_count=6, stage_count=stage_count))
    for place, name in enumerate("abcdef"):
        world.admit(make_admit(name, ids(ord(name), 5 + 150 * place), 90, stop_token_ids=()))
    for _ in range(60):
        while world.schedule():
            pass
        world.learn()
    size = 6 // stage_count
    slots = sorted(sorted(piece.slot for piece in planned.plan.pieces) for planned in world.plans[-stage_count:])
    assert slots == [list(range(start, start + size)) for start in range(0, 6, size)]


def test_the_chunks_of_a_prompt_fill_the_pipeline() -> None:
    world = World(make_scheduler(stage_count=3))
    world.admit(make_admit("a", ids(1, 1000), 1))
    while world.schedule():
        pass
    assert [planned.plan.pieces[0].position for planned in world.plans] == [0, 128, 256]


def test_a_request_decodes_one_token_at_a_time() -> None:
    world = World(make_scheduler(stage_count=3))
    world.admit(make_admit("a", ids(1, 5), 5))
    assert world.schedule()
    assert not world.schedule()
    world.learn()
    assert world.schedule()
    assert not world.schedule()


def test_the_queue_is_bounded_and_says_who_is_next() -> None:
    world = World(make_scheduler(slot_count=1))
    for number in range(QUEUE_MAX + 2):
        world.admit(make_admit(f"r{number}", ids(number, 4), 2))
    for number in range(1, QUEUE_MAX + 1):
        told = [event for event in world.of(f"r{number}") if isinstance(event, Queued)]
        assert {event.position for event in told} == {number - 1}
        assert [event.waiting_requests for event in told] == list(range(number, QUEUE_MAX + 1))
    refused = world.of(f"r{QUEUE_MAX + 1}")
    assert [event.status for event in refused if isinstance(event, Broken)] == [429]
    world.settle()
    ends = [event.request_id for _, event in world.events if isinstance(event, Ended)]
    assert ends == [f"r{number}" for number in range(QUEUE_MAX + 1)]
    told = [(event.position, event.waiting_requests) for event in world.of("r3") if isinstance(event, Queued)]
    assert told[-3:] == [(2, QUEUE_MAX), (1, QUEUE_MAX - 1), (0, QUEUE_MAX - 2)]


@pytest.mark.parametrize(
    ("token_ids", "prompt_length", "pattern"),
    [
        (ids(1, 100), 100, r"100 tokens.*holds 100"),
        (ids(1, 250), 250, r"250 tokens.*holds 100"),
        ([], 0, "empty"),
        ([1, 2], 3, "empty"),
        ([1, -2], 2, "token id -2"),
        ([1, 1000], 2, "token id 1000"),
    ],
)
def test_what_no_engine_could_run_is_refused(token_ids: list[int], prompt_length: int, pattern: str) -> None:
    world = World(make_scheduler(context_length=100))
    world.admit(make_admit("a", token_ids, prompt_length=prompt_length))
    (event,) = world.of("a")
    assert isinstance(event, Broken)
    assert event.status == 400
    assert re.search(pattern, event.message)
    assert_nothing_is_left(world.scheduler, 2)


def test_the_context_is_filled_to_the_last_token() -> None:
    world = World(make_scheduler(context_length=100))
    world.admit(make_admit("a", ids(1, 90), 1000, stop_token_ids=()))
    world.settle()
    end = world.of("a")[-1]
    assert isinstance(end, Ended)
    assert (end.reason, end.completion_tokens) == (FinishReason.LENGTH, 10)


def test_an_attempt_that_is_complete_ends_at_once() -> None:
    """The instance broke after the last token, before its end was told."""
    world = World(make_scheduler())
    world.admit(make_admit("full", ids(1, 10), 4, prompt_length=6))
    world.admit(make_admit("stopped", [5, 6, 9], 40, prompt_length=2, stop_token_ids=(9,)))
    world.admit(make_admit("nothing", [5, 6], 0))
    reasons = [event.reason for _, event in world.events if isinstance(event, Ended)]
    assert reasons == [FinishReason.LENGTH, FinishReason.STOP, FinishReason.LENGTH]
    assert not world.schedule()


def test_a_resumed_attempt_counts_what_was_generated_before() -> None:
    world = World(make_scheduler())
    world.admit(make_admit("a", ids(1, 10), 8, prompt_length=6))
    world.settle()
    events = world.of("a")
    assert [event.position for event in events if isinstance(event, TokenSampled)] == [10, 11, 12, 13]
    assert isinstance(events[-1], Ended)
    assert events[-1].completion_tokens == 8


def test_the_next_turn_of_a_conversation_takes_up_its_slot() -> None:
    world = World(make_scheduler(slot_count=3))
    first = make_admit("first", ids(1, 300), 5)
    world.admit(first)
    world.settle()
    said = [*first.token_ids, *sampled(world.of("first"))]
    world.admit(make_admit("other", ids(2, 50), 5))
    world.settle()
    world.plans.clear()
    world.admit(make_admit("second", [*said, 5, 6, 7], 2))
    world.settle()
    piece = world.plans[0].plan.pieces[0]
    # The last token that was said was sampled, but never run.
    assert (piece.slot, piece.position, piece.token_count) == (0, 304, 4)
    world.admit(make_admit("same", first.token_ids, 1))
    assert world.schedule()
    assert world.plans[-1].plan.pieces[0].position == 299  # the last token's logits are always computed


def first_pieces(world: World, prompts: dict[str, Sequence[int]], count: int = 1) -> dict[str, Piece]:
    """Each asked and answered by itself; the first piece of each."""
    found: dict[str, Piece] = {}
    for name, prompt in prompts.items():
        world.plans.clear()
        world.admit(make_admit(name, prompt, count))
        world.settle()
        [found[name], *_] = [piece for planned in world.plans for piece in planned.plan.pieces]
    return found


GREETING = ids(9, 30)  # what a chat template puts before every prompt


def test_a_greeting_costs_nobody_a_long_conversation() -> None:
    """All prompts of a chat model begin alike. The first words of another one are copied to a slot that is empty, or
    has been free for longest.
    """
    long, short = [*GREETING, *ids(1, 900)], [*GREETING, *ids(2, 20)]
    found = first_pieces(
        World(make_scheduler(slot_count=3)), {"long": long, "short": short, "again": [*long, 1], "third": ids(3, 9)}
    )
    assert [found[name].slot for name in ("long", "short", "again", "third")] == [0, 1, 0, 2]
    assert (found["short"].copy, found["short"].position) == (Copy(0, 0), 30)
    assert (found["again"].copy, found["again"].position) == (None, 930)


def test_a_beginning_is_in_as_many_slots_as_it_is_asked_for() -> None:
    """The same long document with several questions that come together is computed once, in turns."""
    world = World(make_scheduler(slot_count=4))
    document = ids(1, 1500)
    for name in "abcd":
        world.admit(make_admit(name, [*document, ord(name)], 3))
    world.settle()
    computed = sum(piece.token_count for planned in world.plans for piece in planned.plan.pieces)
    assert computed <= 1500 + 4 + 4 * 2
    told = [[each.cached_tokens for each in world.of(name) if isinstance(each, Prefilled)][-1] for name in "abcd"]
    assert sum(told) == 4 * 1501 - (1500 + 4)
    for name in "abcd":
        assert (
            sampled(world.of(name))
            == plain_run(make_admit(name, [*document, ord(name)], 3), 2000, next_token)[0][1501:]
        )


def test_who_comes_takes_a_place_beside_the_others() -> None:
    """Slots that lie apart are computed one after the other, and each reads all weights."""
    world = World(make_scheduler(slot_count=6))
    for name in "abcd":
        world.admit(make_admit(name, ids(ord(name), 5), 500, stop_token_ids=()))
    while not all(request.is_decoding for request in world.scheduler._running.values()):
        world.schedule()
        world.learn()
    for name, slot in (("b", 1), ("a", 0), ("d", 3)):
        world.note(world.scheduler.cancel(1, Cancel(RequestId(name), 0), world.now))
        world.admit(make_admit(f"after {name}", ids(ord(name) + 10, 5), 500, stop_token_ids=()))
        taken = {request.slot for request in world.scheduler._running.values()}
        assert max(taken) - min(taken) == 3, (name, slot)


def test_what_the_cache_held_is_told() -> None:
    world = World(make_scheduler(slot_count=1))
    for name in ("cold", "warm"):
        world.admit(make_admit(name, ids(1, 300), 1))
        world.settle()
    told = {name: [event for event in world.of(name) if isinstance(event, Prefilled)] for name in ("cold", "warm")}
    assert [(each.processed_tokens, each.cached_tokens) for each in told["cold"]] == [(128, 0), (256, 0), (300, 0)]
    assert [(each.processed_tokens, each.cached_tokens) for each in told["warm"]] == [(300, 299)]


def test_penalties_bring_the_tokens_that_they_need_and_no_more() -> None:
    world = World(make_scheduler(slot_count=4))
    settings_of = {
        "plain": Sampling(),
        "repetition": Sampling(repetition_penalty=1.2),
        "presence": Sampling(presence_penalty=0.1),
        "constraint": Sampling(constraint=Constraint(ConstraintKind.REGEX, "a", "x")),
    }
    for name, sampling in settings_of.items():
        world.admit(make_admit(name, [1, 2, 3, 4], 8, prompt_length=3, sampling=sampling))
    world.settle()
    starts = [start for planned in world.plans for start in planned.plan.begun]
    assert [(start.prompt_ids, start.generated_ids) for start in starts] == [
        ((), ()),
        ((1, 2, 3), (4,)),
        ((), (4,)),
        ((), (4,)),
    ]


def test_a_token_that_could_not_be_picked_breaks_its_request_only() -> None:
    scheduler = make_scheduler()
    for name in ("good", "bad"):
        scheduler.admit(1, make_admit(name, [ord(name[0]), 2], 5), 0.0)
    for step in (1, 2, 3):  # prefills, and a decode between them
        assert scheduler.schedule(0.0)
        scheduler.learn(StepOutcome(step, (9,)), 0.0)
    assert scheduler.schedule(0.0)
    events = scheduler.learn(StepOutcome(4, (8, None), "It overflowed."), 0.0)
    assert [type(event).__name__ for _, event in events] == ["TokenSampled", "Broken"]
    assert events[1].event == Broken(RequestId("bad"), 0, "It overflowed.", 500)
    assert scheduler.running_count == 1


def test_a_remark_tells_its_own_requests_reason() -> None:
    """Two that fail in one step: neither is told of the other's constraint."""
    scheduler = make_scheduler()
    for name in ("a", "b"):
        scheduler.admit(1, make_admit(name, [ord(name), 2], 5), 0.0)
    for step in (1, 2, 3):
        assert scheduler.schedule(0.0)
        scheduler.learn(StepOutcome(step, (9,)), 0.0)
    assert scheduler.schedule(0.0)
    remarks = {0: Remark("One.", 400), 1: Remark("Two.", 500)}
    events = scheduler.learn(StepOutcome(4, (None, None), "One.", remarks), 0.0)
    assert [(event.message, event.status) for _, event in events if isinstance(event, Broken)] == [
        ("One.", 400),
        ("Two.", 500),
    ]


def test_a_token_that_is_late_is_asked_for_again() -> None:
    """Its constraint is still being compiled: nothing is told, the others go on, and its place is planned anew."""
    scheduler = make_scheduler()
    for name in ("late", "good"):
        scheduler.admit(1, make_admit(name, [ord(name[0]), 2, 3], 9), 0.0)
    late = {0: Remark("Not yet.", 503, is_late=True)}
    told: list[HeadEvent] = []
    places: list[tuple[int, int]] = []  # of the late one's pieces
    for step in range(1, 11):
        planned = scheduler.schedule(0.0)
        assert planned
        pieces = planned.plan.pieces
        places += [(piece.position, piece.token_count) for piece in pieces if piece.slot == 0]
        is_late = pieces[0].slot == 0 and len(places) < 4
        outcome = StepOutcome(step, (None,), "Not yet.", late) if is_late else StepOutcome(step, (9,) * len(pieces))
        told += [event for _, event in scheduler.learn(outcome, 0.0)]
    assert places[:5] == [(0, 3), (2, 1), (2, 1), (2, 1), (3, 1)]
    names = [event.request_id for event in told if isinstance(event, TokenSampled)]
    assert names[:2] == ["good", "good"]
    assert "late" in names
    assert [event.processed_tokens for event in told if isinstance(event, Prefilled)] == [3, 3]


def test_the_same_admission_twice_runs_once() -> None:
    world = World(make_scheduler())
    admit = make_admit("a", ids(1, 5), 4)
    world.admit(admit)
    world.admit(admit)
    world.settle()
    assert len([event for event in world.of("a") if isinstance(event, Ended)]) == 1


def test_an_unknown_request_can_be_cancelled() -> None:
    assert make_scheduler().cancel(1, Cancel(RequestId("gone"), 0), 0.0) == []


def test_a_cancelled_place_in_the_queue_moves_the_others_up() -> None:
    world = World(make_scheduler(slot_count=1))
    for name in "abcd":
        world.admit(make_admit(name, ids(ord(name), 5), 4))
    world.events.clear()
    world.note(world.scheduler.cancel(1, Cancel(RequestId("b"), 0), 0.0))
    told = [event for _, event in world.events if isinstance(event, Queued)]
    assert [(event.request_id, event.position, event.waiting_requests) for event in told] == [("c", 0, 2), ("d", 1, 2)]


def test_all_are_told_when_the_runner_ends() -> None:
    world = World(make_scheduler(slot_count=1))
    world.admit(make_admit("a", ids(1, 5)), owner=1)
    world.admit(make_admit("b", ids(2, 5)), owner=2)
    world.schedule()
    events = world.scheduler.break_all("Lost.", 503)
    assert [(owner, event.request_id) for owner, event in events] == [(1, "a"), (2, "b")]
    world.learn()
    assert_nothing_is_left(world.scheduler, 1)


def test_a_step_out_of_turn_is_an_error() -> None:
    world = World(make_scheduler(stage_count=2))
    with pytest.raises(StepOrderError):
        world.scheduler.learn(StepOutcome(1, ()), 0.0)
    world.admit(make_admit("a", ids(1, 600)))
    assert world.schedule()
    assert world.schedule()
    with pytest.raises(StepOrderError):
        world.scheduler.learn(StepOutcome(2, ()), 0.0)


def test_times_are_told_in_milliseconds() -> None:
    scheduler = make_scheduler()
    scheduler.admit(1, make_admit("a", [1, 2], 2), 10.0)
    assert scheduler.schedule(10.5)
    scheduler.learn(StepOutcome(1, (5,)), 11.5)
    assert scheduler.schedule(11.5)
    end = scheduler.learn(StepOutcome(2, (6,)), 13.5)[-1].event
    assert isinstance(end, Ended)
    assert (end.timings.queued_ms, end.timings.prefill_ms, end.timings.decode_ms) == (500, 1000, 2000)


@pytest.mark.parametrize(
    ("first", "second", "length"),
    [
        ([], [], 0),
        ([1], [], 0),
        ([1, 2], [1, 2], 2),
        ([1, 2, 3], [1, 2], 2),
        ([1, 2, 3], [1, 5, 3], 1),
        ([2], [1], 0),
    ],
)
def test_shared_length(first: list[int], second: list[int], length: int) -> None:
    assert shared_length(np.array(first, np.int64), np.array(second, np.int64)) == length
