"""The next token is picked as the request asks, from the right distribution, and the same everywhere."""

import math
import time

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from numpy.typing import NDArray

from covey.engine.contract import EngineError, Piece
from covey.engine.plan import SamplingStart, StepPlan
from covey.engine.sampler import Sampler
from covey.engine.sampling import History, gumbel_noise, pick
from covey.schema.generation import Sampling

VOCABULARY = 50
WORD = 2**64 - 1


def random_logits(seed: int, size: int = VOCABULARY, spread: float = 3.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


# ---- the dumb twin: everything in Python floats, one token after the other ----


def twin_noise(seed: int, position: int, token_id: int) -> float:
    def mix(word: int) -> int:
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
        return word ^ (word >> 31)

    step = 0x9E3779B97F4A7C15
    key = mix((mix((seed + step) & WORD) + position + step) & WORD)
    uniform = ((mix((token_id * step + key) & WORD) >> 11) + 0.5) * 2.0**-53
    return -math.log(-math.log(uniform))


def twin_kept(logits: NDArray[np.float32], sampling: Sampling) -> dict[int, float]:
    """The tokens that may be drawn, with their logits over the temperature."""
    scaled = {index: float(value) / sampling.temperature for index, value in enumerate(logits)}
    ranked = sorted(scaled, key=lambda index: -scaled[index])
    if sampling.top_k:
        least = scaled[ranked[min(sampling.top_k, len(ranked)) - 1]]
        ranked = [index for index in ranked if scaled[index] >= least]
    if sampling.top_p < 1:
        weights = [math.exp(scaled[index] - scaled[ranked[0]]) for index in ranked]
        mass = 0.0
        for place, weight in enumerate(weights):
            mass += weight / sum(weights)
            if mass >= sampling.top_p:
                ranked = ranked[: place + 1]
                break
    best = scaled[ranked[0]]
    return {index: scaled[index] for index in ranked if math.exp(scaled[index] - best) >= sampling.min_p}


def twin_pick(logits: NDArray[np.float32], sampling: Sampling, position: int) -> int:
    kept = twin_kept(logits, sampling)
    return max(kept, key=lambda index: kept[index] + twin_noise(sampling.seed, position, index))


samplings = st.builds(
    Sampling,
    temperature=st.floats(0.05, 5.0),
    top_k=st.sampled_from([0, 1, 3, 40, 1000]),
    top_p=st.sampled_from([1.0, 0.999, 0.95, 0.5, 0.1]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)


@given(samplings, st.integers(0, 2**32 - 1), st.integers(0, 2**20))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_agrees_with_the_twin(sampling: Sampling, seed: int, position: int) -> None:
    logits = random_logits(seed)
    assert pick(logits, sampling, position) == twin_pick(logits, sampling, position)


@given(samplings, st.integers(0, 2**32 - 1), st.sampled_from([1.0, 4.0]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_agrees_with_the_twin_on_a_large_vocabulary(sampling: Sampling, seed: int, spread: float) -> None:
    """There it ranks and draws without a look at most of the tokens."""
    logits = random_logits(seed, 1_999, spread)
    assert pick(logits, sampling, 3) == twin_pick(logits, sampling, 3)


def test_an_unlikely_token_is_drawn_as_often_as_it_should_be() -> None:
    """One of 10,000 that share a hundredth of the probability, each 13.8 below the best."""
    logits = np.full(10_001, -13.8155, np.float32)
    logits[0] = 0.0
    drawn = sum(pick(logits, Sampling(seed=5), position) != 0 for position in range(20_000))
    assert 150 < drawn < 255


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.7, top_p=0.9),
        Sampling(temperature=1.5, top_k=8),
        Sampling(temperature=1.2, min_p=0.05),
    ],
    ids=["plain", "top-p", "top-k", "min-p"],
)
def test_frequencies_fit_the_distribution(sampling: Sampling) -> None:
    """20000 draws, chi-square against the softmax of what the twin keeps. Four standard deviations are allowed."""
    logits = random_logits(5, size=24, spread=1.5)
    kept = twin_kept(logits, sampling)
    total = sum(math.exp(value) for value in kept.values())
    draws = 20_000
    counts = np.bincount([pick(logits, sampling, position) for position in range(draws)], minlength=24)
    assert set(np.flatnonzero(counts)) <= set(kept)
    expected = {index: draws * math.exp(value) / total for index, value in kept.items()}
    chi_square = sum((counts[index] - wanted) ** 2 / wanted for index, wanted in expected.items())
    freedom = len(kept) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_the_noise_of_seeds_and_positions_is_unrelated() -> None:
    ids = np.arange(4096)
    first, second, third = (gumbel_noise(*key, ids) for key in ((1, 1), (2, 1), (1, 2)))
    for other in (second, third):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.06
    assert abs(first.mean() - 0.5772) < 0.08  # Euler's constant, the mean of Gumbel noise
    assert abs(first.var() - math.pi**2 / 6) < 0.25


def test_greedy_takes_the_best_whatever_else_is_set() -> None:
    logits = random_logits(1)
    for temperature in (0.0, -1.0, math.nan):
        sampling = Sampling(temperature=temperature, top_k=3, top_p=0.5, min_p=0.5)
        assert pick(logits, sampling, 9) == int(logits.argmax())


odd = st.sampled_from([0.0, 1e-300, 1e-12, 1e-9, 1.0, 1e9, 1e300, math.inf, math.nan, -1.0, -1e300])


@given(odd, odd, odd, st.integers(-5, 2**40), st.integers(-(2**63), 2**64 - 1))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_odd_settings_still_pick_a_token(temperature: float, top_p: float, min_p: float, top_k: int, seed: int) -> None:
    logits = random_logits(3)
    logits[7] = -np.inf  # a masked token
    token_id = pick(logits, Sampling(temperature=temperature, top_p=top_p, min_p=min_p, top_k=top_k, seed=seed), 0)
    assert 0 <= token_id < VOCABULARY
    assert token_id != 7


@given(odd, odd, odd)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_odd_penalties_still_pick_a_token(repetition: float, presence: float, frequency: float) -> None:
    sampling = Sampling(repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency)
    penalized = History(VOCABULARY, (1, 2), (2, 2, 4)).penalize(random_logits(3), sampling)
    assert not np.isnan(penalized).any()
    assert 0 <= pick(penalized, sampling, 0) < VOCABULARY


def test_the_extremes_mean_what_they_say() -> None:
    logits = random_logits(4)
    best = int(logits.argmax())
    for sampling in (Sampling(temperature=1e-9), Sampling(top_p=1e-12), Sampling(top_k=1), Sampling(min_p=1.0)):
        assert {pick(logits, sampling, position) for position in range(50)} == {best}
    wild = {pick(logits, Sampling(temperature=1e9), position) for position in range(1000)}
    assert len(wild) == VOCABULARY


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error(value: float) -> None:
    logits = random_logits(1)
    logits[3] = value
    for temperature in (0.0, 1.0):
        with pytest.raises(EngineError, match="overflow on this prompt, or its file is damaged"):
            pick(logits, Sampling(temperature=temperature), 0)
    with pytest.raises(EngineError):
        pick(np.full(VOCABULARY, -np.inf, np.float32), Sampling(), 0)


def test_penalties_count_what_their_sources_say() -> None:
    """Prompt 1, 2; generated 2, 2, 4. Only the repetition penalty sees the prompt."""
    logits = np.array([1, 2, 3, 4, -5], np.float32)
    history = History(5, (1, 2), (2, 2, 4))
    repeated = history.penalize(logits, Sampling(repetition_penalty=2.0))
    assert repeated.tolist() == [1, 1, 1.5, 4, -10]
    present = history.penalize(logits, Sampling(presence_penalty=0.5))
    assert present.tolist() == [1, 2, 2.5, 4, -5.5]
    frequent = history.penalize(logits, Sampling(frequency_penalty=0.5))
    assert frequent.tolist() == [1, 2, 2, 4, -5.5]
    assert logits.tolist() == [1, 2, 3, 4, -5]


def plan_of(*pieces: Piece, begun: tuple[SamplingStart, ...] = (), released: tuple[int, ...] = ()) -> StepPlan:
    return StepPlan(1, pieces, begun, released)


def test_a_resumed_request_goes_on_with_the_same_tokens() -> None:
    """Ten tokens in one go; or four, then a new attempt that is told of them, in another slot."""
    sampling = Sampling(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, seed=11)
    prompt = (3, 4, 5)

    def generate(sampler: Sampler, slot: int, done: list[int], count: int) -> list[int]:
        begun = (SamplingStart(slot, sampling, prompt, tuple(done)),)
        tokens = list(done)
        for _ in range(count):
            position = len(prompt) + len(tokens)
            piece = Piece(slot, position - 1, 1, wants_logits=True)
            logits = random_logits(position)[None]
            token_id = sampler.sample(plan_of(piece, begun=begun), logits).token_ids[0]
            assert token_id is not None
            tokens.append(token_id)
            begun = ()
        return tokens

    whole = generate(Sampler(), 0, [], 10)
    half = generate(Sampler(), 0, [], 4)
    assert half == whole[:4]
    assert generate(Sampler(), 2, half, 6) == whole


@pytest.mark.parametrize("repetition", [1.0, 1.3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_banned_token_is_never_picked(temperature: float, repetition: float) -> None:
    """Whoever measures wants as many tokens as were asked for."""
    logits = random_logits(1)
    best, *others = np.argsort(-logits)[:5].tolist()
    banned = Sampling(temperature=temperature, repetition_penalty=repetition, logit_bias={best: -np.inf})
    before = logits.copy()
    sampler, picked = Sampler(), list[int | None]()
    for position in range(200):
        begun = (SamplingStart(0, banned, prompt_ids=(best,)),) if position == 0 else ()
        plan = plan_of(Piece(0, position, 1, wants_logits=True), begun=begun)
        picked += sampler.sample(plan, logits[None]).token_ids
    assert best not in picked
    assert set(others) & set(picked)
    assert np.array_equal(logits, before)


def test_one_bad_row_fails_alone() -> None:
    """A prompt on which the model overflows must not take the others' tokens away."""
    greedy = Sampling(temperature=0)
    starts = tuple(SamplingStart(slot, greedy) for slot in (0, 1))
    pieces = (
        Piece(0, 0, 2, wants_logits=True),
        Piece(2, 0, 3, wants_logits=False),
        Piece(1, 5, 1, wants_logits=True),
    )
    logits = np.stack([np.full(VOCABULARY, np.nan, np.float32), random_logits(2)])
    outcome = Sampler().sample(plan_of(*pieces, begun=starts), logits)
    assert outcome.token_ids == (None, int(random_logits(2).argmax()))
    assert "not numbers" in outcome.failure


def test_a_released_slot_is_forgotten() -> None:
    sampler = Sampler()
    empty = np.empty((0, VOCABULARY), np.float32)
    sampler.sample(plan_of(begun=(SamplingStart(0, Sampling()),)), empty)
    assert list(sampler._slots) == [0]
    again = SamplingStart(0, replace(Sampling(), seed=2))
    sampler.sample(plan_of(begun=(again,), released=(0,)), empty)
    assert list(sampler._slots) == [0]
    sampler.sample(plan_of(released=(0,)), empty)
    assert not sampler._slots


def test_is_fast_enough_for_every_token() -> None:
    """Limits are several times what a quiet machine needs, so that a busy one passes too."""
    logits = random_logits(0, size=49_152)
    for limit_ms, sampling in ((0.3, Sampling(temperature=0)), (8.0, Sampling(temperature=0.8, top_p=0.95))):
        best = math.inf
        for position in range(20):
            started = time.perf_counter()
            pick(logits, sampling, position)
            best = min(best, time.perf_counter() - started)
        assert best * 1000 < limit_ms


# ---- bias and log probabilities ----


def test_a_bias_bans_and_prefers() -> None:
    """A banned token never comes, a preferred one always does; the logits themselves stay as they are."""
    logits = random_logits(3)[None]
    best = int(logits.argmax())
    for bias, expected in (({best: -100.0}, {best}), ({7: 100.0}, set(range(VOCABULARY)) - {7})):
        sampler = Sampler()
        begun = (SamplingStart(0, Sampling(seed=1, logit_bias=bias)),)
        for position in range(50):
            outcome = sampler.sample(plan_of(Piece(0, position, 1, wants_logits=True), begun=begun), logits)
            assert outcome.token_ids[0] not in expected
            begun = ()
    assert np.array_equal(logits[0], random_logits(3))


def test_a_bias_of_a_token_that_is_not_there_fails_alone() -> None:
    starts = (SamplingStart(0, Sampling(logit_bias={VOCABULARY: 1.0})), SamplingStart(1, Sampling(temperature=0)))
    pieces = tuple(Piece(slot, 0, 1, wants_logits=True) for slot in (0, 1))
    logits = np.stack([random_logits(1), random_logits(2)])
    outcome = Sampler().sample(plan_of(*pieces, begun=starts), logits)
    assert outcome.token_ids == (None, int(logits[1].argmax()))
    assert "not below 50" in outcome.remarks[0].failure


@given(seed=st.integers(0, 1000), count=st.integers(0, 20), spread=st.sampled_from([0.0, 3.0, 1e4]))
@settings(max_examples=60)
def test_log_probabilities_are_those_of_the_models_logits(seed: int, count: int, spread: float) -> None:
    """What is done to the logits for the choice does not show in them. Among equals the lower ids come first."""
    logits = random_logits(seed, spread=spread)
    logits[5] = -np.inf
    sampling = Sampling(seed=seed, temperature=1.5, presence_penalty=2, logit_bias={5: 100.0, 9: 100.0})
    plan = plan_of(Piece(0, 0, 1, wants_logits=True), begun=(SamplingStart(0, replace(sampling, top_logprobs=count)),))
    outcome = Sampler().sample(plan, logits[None])
    exact = logits.astype(np.float64)
    expected = np.maximum(exact - np.logaddexp.reduce(exact), -9999.0)
    told = outcome.remarks[0].likelihood
    assert told is not None
    [token_id] = outcome.token_ids
    assert token_id is not None
    assert told.logprob == pytest.approx(expected[token_id], abs=1e-6)
    order = sorted(range(VOCABULARY), key=lambda each: (-logits[each], each))[:count]
    assert [each for each, _ in told.likeliest] == order
    assert [logprob for _, logprob in told.likeliest] == pytest.approx(expected[order], abs=1e-6)


def test_who_asks_for_nothing_is_told_nothing_more() -> None:
    outcome = Sampler().sample(
        plan_of(Piece(0, 0, 1, wants_logits=True), begun=(SamplingStart(0, Sampling()),)), random_logits(0)[None]
    )
    assert outcome.remarks == {}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(outcome)).keys() == {"type", "step", "token_ids"}
