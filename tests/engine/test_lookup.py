"""Guesses come from what stood there before, and only while they turn out right."""

import numpy as np
import pytest

from covey.engine.contract import Piece
from covey.engine.guessing import GUESSES_MAX
from covey.engine.lookup import INDEXED_MAX, LENGTH, Lookup
from covey.engine.plan import SamplingStart, StepPlan
from covey.engine.sampler import Sampler
from covey.schema.generation import Sampling

PASSAGE = [*range(100, 160)]


def follow(lookup: Lookup, tokens: list[int], said: list[int]) -> tuple[list[int], int]:
    """The number of tokens that each step brought, and how many guesses were wrong."""
    counts: list[int] = []
    wrong = 0
    while said:
        guesses = lookup.guess(tokens, GUESSES_MAX).token_ids
        right = next((n for n, pair in enumerate(zip(guesses, said, strict=False)) if pair[0] != pair[1]), len(guesses))
        wrong += len(guesses) - min(right, len(said))
        counts.append(min(right + 1, len(said)))
        tokens, said = tokens + said[: counts[-1]], said[counts[-1] :]
    return counts, wrong


def test_a_passage_that_is_quoted_comes_several_tokens_at_a_time() -> None:
    counts, wrong = follow(Lookup(), [1, *PASSAGE, 2, 3], PASSAGE)
    assert wrong == 0
    assert counts[: LENGTH + 1] == [1] * (LENGTH + 1)  # the first comparison costs nothing and trusts nothing
    assert len(counts) < len(PASSAGE) / 2
    assert max(counts) == 6


def test_what_never_stood_there_before_is_not_guessed() -> None:
    counts, wrong = follow(Lookup(), [1, *PASSAGE], [*range(200, 300)])
    assert (set(counts), wrong) == ({1}, 0)


def test_where_the_same_words_lead_elsewhere_each_time_little_is_guessed() -> None:
    """Each time the three tokens stand there something else follows."""
    said = [token for number in range(100) for token in (7, 8, 9, 1000 + number)]
    counts, wrong = follow(Lookup(), [1, 2, 3], said)
    assert sum(counts) == len(said)
    assert wrong < len(said) / 40


def test_trust_comes_back_where_a_passage_is_quoted_after_many_wrong_guesses() -> None:
    lookup = Lookup()
    odd = [token for number in range(30) for token in (7, 8, 9, 1000 + number)]
    follow(lookup, [1, *PASSAGE], odd)
    counts, _ = follow(lookup, [1, *PASSAGE, *odd], PASSAGE)
    assert max(counts[-3:]) > 2


def test_the_latest_of_several_places_counts() -> None:
    lookup = Lookup()
    lookup.guess([7, 8, 9, 1, 1, 7, 8, 9, 2, 2], 3)
    assert lookup.guess([7, 8, 9, 1, 1, 7, 8, 9, 2, 2, 7, 8, 9], 3).token_ids == ()
    assert lookup.guess([7, 8, 9, 1, 1, 7, 8, 9, 2, 2, 7, 8, 9, 2], 3).token_ids[0] == 2


def test_of_a_very_long_text_the_latest_part_is_known() -> None:
    lookup = Lookup()
    lookup.guess([*range(INDEXED_MAX + 100)], 3)
    assert len(lookup._follows) == INDEXED_MAX


@pytest.mark.parametrize(("guesses", "expected"), [((5, 6), (5, 6, 7)), ((5, 9), (5, 6)), ((9, 6), (5,))])
def test_the_sampler_goes_on_as_long_as_guesses_are_right(guesses: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """The logits of the three tokens say 5, 6 and 7."""
    logits = np.zeros((3, 10), np.float32)
    logits[[0, 1, 2], [5, 6, 7]] = 9.0
    piece = Piece(0, 3, 3, wants_logits=True, guess_count=2)
    start = SamplingStart(0, Sampling(temperature=0.0))
    outcome = Sampler().sample(StepPlan(1, (piece,), (start,), guesses={0: guesses}), logits)
    assert (*outcome.token_ids, *outcome.followers[0]) == expected


@pytest.mark.parametrize("penalty", [0.0, 3.0])
def test_what_is_drawn_is_what_would_have_been_drawn_without_guesses(penalty: float) -> None:
    """Noise is of the position, and penalties count what was said, so both ways draw the same."""
    random = np.random.default_rng(5)
    logits = random.normal(0, 2, (6, 50)).astype(np.float32)
    start = SamplingStart(0, Sampling(seed=11, presence_penalty=penalty))
    alone, together = Sampler(), Sampler()
    said: list[int] = []
    for step, row in enumerate(logits):
        plan = StepPlan(step, (Piece(0, 10 + step, 1, wants_logits=True),), (start,) if step == 0 else ())
        said += [token for token in alone.sample(plan, row[None]).token_ids if token is not None]
    piece = Piece(0, 10, 6, wants_logits=True, guess_count=5)
    outcome = together.sample(StepPlan(0, (piece,), (start,), guesses={0: tuple(said[:5])}), logits)
    assert [*outcome.token_ids, *outcome.followers[0]] == said
