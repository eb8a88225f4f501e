"""A draft model reads each token once, drops what it guessed wrong, and is asked only where that pays."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from covey.engine.contract import Activations, EngineError, Exchange, LoadProgress, Logits, Piece
from covey.engine.cores import Cores
from covey.engine.draft import DraftModel
from covey.engine.drafting import MEMORY, TRIED, TRYING_SHARE, Drafted, Drafting
from covey.engine.guessing import GUESSES_MAX, ROW_COST, Guesses, Trust
from covey.engine.request import Request
from covey.engine.runner import Runner
from covey.engine.sampling import pick
from covey.schema.generation import PREFILL_CHUNK_TOKENS, Sampling
from covey.schema.model import Shard
from covey.schema.runner import Draft, RunnerSpec
from tests.engine.harness import GREEDY, loaded, make_admit, make_spec

VOCABULARY = 50
DRAFT = Draft(model_path="draft.gguf", layer_count=3)
TEXTS = {"": [str(token_id) for token_id in range(VOCABULARY)]}


class Counting:
    """An engine that says that the next number follows each, but that a token of padding were likelier."""

    def __init__(self, texts: dict[str, list[str]] | None = None) -> None:
        self.runs: list[tuple[int, list[int]]] = []
        self.slot: list[int] = []
        self.specs: list[RunnerSpec] = []
        self._texts = texts or {}

    def token_texts(self, model_path: str) -> Sequence[str]:
        return self._texts.get(model_path, ())

    def load(self, spec: RunnerSpec, progress: Callable[[LoadProgress], None], exchange: Exchange) -> None:
        self.specs.append(spec)
        self.slot = []
        assert (exchange.rank, exchange.count) == (0, 1)
        progress(LoadProgress(3, 3, 30, 30))

    def warm_up(self) -> None:
        self.slot = []

    def run(self, pieces: Sequence[Piece], values: Activations) -> Activations | Logits:
        [piece] = pieces
        assert piece.slot == 0
        assert piece.position <= len(self.slot)
        assert piece.token_count == len(values) <= PREFILL_CHUNK_TOKENS
        self.slot[piece.position :] = values.tolist()
        self.runs.append((piece.position, values.tolist()))
        logits = np.zeros((int(piece.wants_logits), VOCABULARY + 10), np.float32)
        logits[:, (self.slot[-1] + 1) % VOCABULARY] = 1.0
        logits[:, VOCABULARY:] = 2.0
        return logits


def make_draft(engine: Counting | None = None, **changes: Any) -> tuple[DraftModel, Counting]:
    engine = engine or Counting()
    spec = make_spec(**({"vocabulary_size": VOCABULARY, "draft": DRAFT} | changes))
    draft = DraftModel(spec, DRAFT, Cores(), engine)
    draft.load(spec, lambda _: None)
    return draft, engine


# ---- the model ----


def test_each_token_is_read_once() -> None:
    draft, engine = make_draft()
    assert draft.guess([5, 9, 20], 3, GREEDY).token_ids == (21, 22, 23)
    assert engine.runs == [(0, [5, 9]), (2, [20]), (3, [21]), (4, [22])]
    engine.runs.clear()
    assert draft.guess([5, 9, 20, 21, 22, 23, 24], 2, GREEDY).token_ids == (25, 26)
    assert engine.runs == [(5, [23, 24]), (7, [25])], "all guesses were right; the last one was not read yet"


def test_what_was_guessed_wrong_is_dropped() -> None:
    draft, engine = make_draft()
    draft.guess([5, 9, 20], 3, GREEDY)
    engine.runs.clear()
    assert draft.guess([5, 9, 20, 21, 40], 2, GREEDY).token_ids == (41, 42)
    assert engine.runs == [(4, [40]), (5, [41])]
    assert engine.slot == [5, 9, 20, 21, 40, 41]


def test_the_next_turn_of_a_conversation_begins_where_it_was_left() -> None:
    draft, engine = make_draft()
    prompt = [place % VOCABULARY for place in range(100)]
    draft.guess(prompt, 2, GREEDY)
    engine.runs.clear()
    draft.guess([*prompt[:90], 7, 7, 7, 7, 8], 1, GREEDY)
    assert engine.runs == [(90, [7, 7, 7, 7]), (94, [8])]


def test_a_long_prompt_is_read_in_chunks_and_nothing_is_guessed_meanwhile() -> None:
    draft, engine = make_draft()
    prompt = [place * 7 % VOCABULARY for place in range(2 * PREFILL_CHUNK_TOKENS + 10)]
    assert [draft.guess(prompt, 2, GREEDY).token_ids for _ in range(2)] == [(), ()]
    assert [len(tokens) for _, tokens in engine.runs] == [PREFILL_CHUNK_TOKENS] * 2
    assert draft.guess([*prompt, 8], 2, GREEDY).token_ids == (9, 10)
    assert engine.slot == [*prompt, 8, 9]


def test_the_same_text_may_be_asked_for_again() -> None:
    draft, engine = make_draft()
    assert draft.guess([5, 9, 20], 2, GREEDY)[0] == draft.guess([5, 9, 20], 2, GREEDY)[0] == (21, 22)
    assert engine.slot == [5, 9, 20, 21]


def test_nothing_beyond_the_vocabulary_is_guessed_or_read() -> None:
    """The model knows ids that the draft does not: they are read as another one."""
    draft, engine = make_draft(vocabulary_size=30)
    assert draft.guess([5, 40, 28], 3, GREEDY).token_ids == (29, 0, 0 + 1)
    assert max(engine.slot) < 30
    assert draft.guess([5, 40, 28, 29, 45], 1, GREEDY).token_ids == (1,)


def test_the_smaller_vocabulary_counts() -> None:
    texts = {"": [*TEXTS[""], "more"], DRAFT.model_path: TEXTS[""][:20]}
    draft, _ = make_draft(Counting(texts))
    assert draft.guess([18], 2, GREEDY).token_ids == (19, 0)


def test_a_token_that_a_draft_names_but_has_no_row_for_is_read_as_another_one() -> None:
    """Gemma 3's tokenizer names one more token than its smallest model has rows."""
    small = replace(DRAFT, vocabulary_size=20)
    engine = Counting(TEXTS | {small.model_path: TEXTS[""]})
    spec = make_spec(vocabulary_size=VOCABULARY, draft=small)
    draft = DraftModel(spec, small, Cores(), engine)
    draft.load(spec, lambda _: None)
    assert draft.guess([5, 20, 18], 1, GREEDY).token_ids == (19,)
    assert max(engine.slot) < 20


@pytest.mark.parametrize("place", [0, 13, 19])
def test_a_draft_of_another_family_is_refused(place: int) -> None:
    theirs = [*TEXTS[""][:place], "other", *TEXTS[""][place + 1 : 20]]
    with pytest.raises(EngineError) as error:
        make_draft(Counting(TEXTS | {DRAFT.model_path: theirs}))
    told = f"its token {place} is 'other', the model's is '{place}'; choose a draft of the same family"
    assert str(error.value) == f"the draft model draft.gguf: {told}"


def test_numbers_without_a_token_differ_freely() -> None:
    """Files pad their vocabularies with names of their own."""
    draft, _ = make_draft(Counting({"": ["a", "", "c"], DRAFT.model_path: ["a", "b", "", "d"]}))
    assert draft.guess([1], 1, GREEDY).token_ids == (2,)


def test_it_is_loaded_whole_with_one_slot_and_as_fast_as_can_be() -> None:
    options = {"exact": "1", "lookup": "0", "quantize": "q8", "kv_cache": "f16", "step_delay_ms": "20"}
    head = make_spec(0, 2, rank_count=2, rank_node_ids=("a", "b"), engine_options=options, draft=DRAFT)
    _, engine = make_draft(engine_options=options, rank_count=2, rank_node_ids=("a", "b"))
    [spec] = engine.specs
    assert (spec.shard, spec.slot_count, spec.context_length) == (Shard(0, 3, 3), 1, head.context_length)
    assert (spec.stage_count, spec.rank_count, spec.draft) == (1, 1, None)
    assert (spec.model_path, spec.engine_options) == ("draft.gguf", {"quantize": "q8", "kv_cache": "f16"})


def test_it_draws_with_the_noise_of_the_place() -> None:
    """So a draft that weighs tokens as the model does draws the same ones."""
    draft, _ = make_draft()
    sampling = Sampling(temperature=1.0, seed=3)
    logits = np.zeros(VOCABULARY, np.float32)
    logits[21] = 1.0
    [said] = draft.guess([5, 9, 20], 1, sampling).token_ids
    assert said == pick(logits, sampling, 3) != 21


def test_logits_that_are_no_numbers_guess_nothing() -> None:
    class Broken(Counting):
        def run(self, pieces: Sequence[Piece], values: Activations) -> Activations | Logits:
            return super().run(pieces, values) * np.float32(np.nan)

    draft, _ = make_draft(Broken())
    assert draft.guess([5, 9, 20], 3, GREEDY).token_ids == ()


def test_one_whose_engine_fails_says_nothing_until_it_is_loaded_again() -> None:
    """The model goes on without it."""
    draft, engine = make_draft()

    def fail(pieces: Sequence[Piece], values: Activations) -> Logits:
        engine.runs.append((pieces[0].position, values.tolist()))
        raise EngineError("there is too little memory")

    works, engine.run = engine.run, fail
    assert [draft.guess([5, 9], 3, GREEDY).token_ids for _ in range(3)] == [(), (), ()]
    assert (len(engine.runs), draft.is_running) == (1, False)
    engine.run = works
    draft.load(make_spec(vocabulary_size=VOCABULARY, draft=DRAFT), lambda _: None)
    assert draft.guess([5, 9], 3, GREEDY).token_ids == (10, 11, 12)


def test_after_another_load_nothing_is_held() -> None:
    draft, engine = make_draft()
    draft.guess([5, 9, 20], 1, GREEDY)
    draft.load(make_spec(draft=DRAFT), lambda _: None)
    engine.runs.clear()
    assert draft.guess([5, 9, 20], 1, GREEDY).token_ids == (21,)
    assert engine.runs[0][0] == 0


@pytest.mark.parametrize("wanted", [None, Draft(model_path="other.gguf", layer_count=3)])
def test_a_runner_keeps_its_draft_until_it_is_to_have_none_or_another(wanted: Draft | None) -> None:
    runner = Runner(pipe=None)  # type: ignore[arg-type] - nothing is told
    kept = runner._find_draft(make_spec(draft=DRAFT))
    assert kept is not None
    assert runner._find_draft(make_spec(draft=DRAFT, generation=1, shard=Shard(0, 2, 6))) is kept
    old = weakref.ref(kept)
    del kept
    found = runner._find_draft(make_spec(draft=wanted))
    assert (found is None) == (wanted is None)
    assert old() is None


def test_a_fake_draft_with_as_many_layers_is_always_right() -> None:
    """So tests of all around it know how often a draft is right."""
    tokens, rights = [1, 2, 3], {}
    stage = loaded(make_spec())
    for layers in (6, 5):
        spec = make_spec(draft=Draft(model_path="", layer_count=layers), vocabulary_size=256)
        draft = DraftModel(spec, spec.draft, Cores())
        draft.load(spec, lambda _: None)
        draft.warm_up()
        said = list(draft.guess(tokens, 7, GREEDY).token_ids)
        piece = Piece(0, 0, 10, wants_logits=True, guess_count=7)
        meant = stage.run([piece], np.array([*tokens, *said], np.int64)).argmax(axis=1)
        rights[layers] = sum(a == b for a, b in zip(said, meant, strict=False))
    assert rights[6] == 7
    assert rights[5] < 3


# ---- when it is asked ----


@dataclass
class Drafter:
    """Says the next numbers, or something else; each guess takes so long."""

    guess_s: float = 0.1
    is_right: bool = True
    chunk_s: float = 0.0
    lacks: int = 0  # runs that read before it guesses
    asked: list[int] = field(default_factory=list)

    def guess(self, tokens: Sequence[int], most: int, _: Sampling) -> Drafted:
        self.asked.append(most)
        if self.lacks:
            self.lacks -= 1
            return Drafted((), self.chunk_s, 0.0)
        start = tokens[-1] + (1 if self.is_right else 1000)
        return Drafted(tuple(range(start, start + most)), 0.0, most * self.guess_s)


@dataclass
class Text:
    """One that counts, and how long it takes. A step with one token takes a second."""

    drafting: Drafting
    name: str = "a"
    request: Request = field(init=False)
    seconds: float = 0.0
    steps: int = 0
    drafted: int = 0  # guesses that steps computed

    def __post_init__(self) -> None:
        self.request = Request(1, make_admit(self.name, [1]), 0.0)
        self.tokens = self.request.tokens

    def improved(self, found: Guesses) -> Guesses:
        return self.drafting.improve(self.request, GUESSES_MAX, found)

    def go(self, count: int) -> "Text":
        for _ in range(count):
            guesses = self.improved(Guesses())
            right = 0
            for token in guesses.token_ids:
                if token != self.tokens[-1] + right + 1:
                    break
                right += 1
            took = 1 + ROW_COST * len(guesses.token_ids)
            self.drafting.note_step(took, len(guesses.token_ids))
            self.tokens += range(self.tokens[-1] + 1, self.tokens[-1] + right + 2)
            self.seconds += took + guesses.seconds
            self.steps, self.drafted = self.steps + 1, self.drafted + len(guesses.token_ids)
        return self


def test_one_that_guesses_well_is_asked_for_as_many_as_pay() -> None:
    text = Text(Drafting(Drafter(guess_s=0.1))).go(100)
    assert text.drafted > 300
    assert (len(text.tokens) - 1) / text.seconds > 1.7
    dear = Text(Drafting(Drafter(guess_s=0.4))).go(100)
    assert 0 < dear.drafted < text.drafted
    assert (len(dear.tokens) - 1) / dear.seconds > 1.1


def test_one_as_slow_as_the_model_is_hardly_asked() -> None:
    text = Text(Drafting(Drafter(guess_s=1.0))).go(1000)
    assert text.drafted == 0
    assert text.seconds < 1000 * 1.03


@pytest.mark.parametrize("guess_s", [0.02, 0.1, 0.3, 1.0])
def test_one_that_guesses_badly_costs_little(guess_s: float) -> None:
    drafter = Drafter(guess_s, is_right=False)
    text = Text(Drafting(drafter)).go(500)
    assert text.drafted <= 8
    assert text.seconds < 500 * 1.03
    assert drafter.asked[1:], "it is tried now and then"


def test_where_the_text_can_be_guessed_again_it_is() -> None:
    drafter = Drafter(is_right=False)
    text = Text(Drafting(drafter)).go(300)
    drafter.is_right = True
    before = text.drafted
    text.go(300)
    assert text.drafted - before > 200


def test_what_is_looked_up_comes_first_where_it_brings_as_much() -> None:
    text = Text(Drafting(Drafter())).go(50)
    sure, unsure = Guesses((-1,), gain=3.0), Guesses((-1,), gain=1.1)
    assert text.improved(sure) == sure
    assert text.improved(unsure).token_ids[0] == text.tokens[-1] + 1


def test_reading_a_long_prompt_takes_turns_with_steps() -> None:
    drafter = Drafter(chunk_s=5.0)
    drafting = Drafting(drafter)
    Text(drafting).go(50)
    drafter.lacks = 3
    text = Text(drafting, "b")
    lacked = [(text.go(1), drafter.lacks)[1] for _ in range(15)]
    assert lacked == [2] * 5 + [1] * 5 + [0] * 5, "as long as a chunk took, there is none"
    assert text.drafted == 0
    text.go(1)
    assert text.drafted > 0


def test_a_bad_one_reads_no_prompts() -> None:
    drafter = Drafter(chunk_s=5.0, is_right=False)
    drafting = Drafting(drafter)
    Text(drafting).go(100)
    for number in range(20):
        drafter.lacks = 10
        text = Text(drafting, f"r{number}").go(50)
        assert text.drafted == 0
    assert drafter.asked.count(TRIED) < 8 + 20 * 50 * TRYING_SHARE


def test_a_slower_engine_is_noticed() -> None:
    """The draft's part of a step is less then, so it pays again."""
    drafter = Drafter(guess_s=1.0)
    drafting = Drafting(drafter)
    Text(drafting).go(200)
    drafter.guess_s = 0.05
    text = Text(drafting).go(800)
    assert text.drafted > 300


def test_trust_goes_by_the_latest_comparisons() -> None:
    trust = Trust(MEMORY, 0.6, 1.0)
    for _ in range(100):
        trust.expect((1, 2, 3))
        trust.see((1,))
        trust.see((2, 3, 4))
    assert trust.rate > 0.95
    trust.see((9,))  # nothing is expected any more
    assert trust.rate > 0.95
    for _ in range(20):
        trust.expect((1, 2, 3))
        trust.see((2, 2, 3))
    assert trust.rate < 0.45
