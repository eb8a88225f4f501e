"""Picks the next token from one row of logits: pure NumPy, no state and no generator of its own.

The order is that of Hugging Face's `generate`: penalties, temperature, then top-k, top-p and min-p, each over what
the one before left. (llama.cpp applies the temperature last.) One of the kept tokens is then drawn by the Gumbel-max
trick (Gumbel 1954; Maddison et al., "A* Sampling", 2014): the largest `logit / temperature + noise` is a draw from
their softmax. The noise of a token is a hash of (seed, position, token id), so the choice depends on neither the
machine, the batch nor the order of calls, and a resumed request goes on as it would have.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from covey.engine.contract import EngineError
from covey.schema.generation import Sampling

Row = NDArray[np.float32]  # [vocabulary]
Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]  # [vocabulary]: which tokens may come
Scaled = NDArray[np.float32]  # logits over temperature, relative to the best (which is 0)

WORD: Final = 2**64 - 1
GOLDEN: Final = 0x9E3779B97F4A7C15  # the constants of SplitMix64 (Steele, Lea, Flood 2014)
MIX_1: Final = 0xBF58476D1CE4E5B9
MIX_2: Final = 0x94D049BB133111EB

# Noise made of so many random bits (what a float64 holds exactly) lies between -3.63 and 37.43, so a token that is
# further than the difference below the best is never drawn.
NOISE_BITS: Final = 53
NOISE_SPAN: Final = 41.1
UNLIKELY: Final = 8.0  # this far below the best, a token is one of those that are looked at by their hashes first
GROUP_SIZE: Final = 64  # tokens, of which the best is looked for together
TEMPERATURE_MIN: Final = 1e-30  # of a float32; it is as good as greedy
TEMPERATURE_MAX: Final = 1e30  # infinity would make not-a-number of a masked token's -infinity
LOGIT_MAX: Final = 1e30  # keeps absurd penalties finite, so that one token is still the best


def pick(logits: Row, sampling: Sampling, position: int) -> int:
    """The token for `position` of the sequence, penalties being applied already. Odd settings mean the nearest
    sensible ones; a temperature that is not above 0 is greedy. Raises `EngineError` if no logit is a finite best.
    """
    best = int(logits.argmax())  # the first not-a-number counts as the largest
    if not math.isfinite(logits[best]):
        raise EngineError(
            "The model computed logits that are not numbers: its weights overflow on this prompt, or its file is "
            "damaged."
        )
    if not sampling.temperature > 0:
        return best
    ids = best_ids(logits, sampling.top_k) if sampling.top_k > 0 else every_id(logits.size)
    scaled = _scale(logits[ids], float(logits[best]), sampling.temperature)
    ids, scaled = _top_p(ids, scaled, sampling.top_p)
    ids, scaled = _above(ids, scaled, _floor(sampling.min_p))
    return _draw(ids, scaled, _key(sampling.seed, position))


@lru_cache(maxsize=4)
def every_id(vocabulary_size: int) -> Ids:
    """0, 1, 2 and so on; not to be written to."""
    return np.arange(vocabulary_size)


def best_ids(logits: Row, count: int) -> Ids:
    """The `count` best tokens in the order of their ids, more where the last are equal; all if there are no more."""
    if count >= logits.size:
        return every_id(logits.size)
    likely = _likely_ids(logits, count)
    values = logits[likely]
    place = values.size - count
    return likely[values >= np.partition(values, place)[place]]


def _likely_ids(logits: Row, count: int) -> Ids:
    """Some hundred tokens with the `count` best among them: all that reach the best of the group with the `count`-th
    best one. Finding these is a tenth of the work of ranking a large vocabulary.
    """
    groups = logits.size // GROUP_SIZE
    if groups < 2 * count:
        return every_id(logits.size)
    tops = logits[: groups * GROUP_SIZE].reshape(GROUP_SIZE, groups).max(axis=0)
    return np.flatnonzero(logits >= np.partition(tops, groups - count)[groups - count])


def _draw(ids: Ids, scaled: Scaled, key: int) -> int:
    """The token whose `scaled` and noise together are most.

    Of many tokens nearly all are so unlikely that only rare noise would do: their hashes say so, without logarithms.
    """
    likely = np.flatnonzero(scaled >= -UNLIKELY)
    sums = scaled[likely] + _noise(_hash(key, ids[likely]))
    best, most = int(sums.argmax()), float(sums.max())
    if likely.size < ids.size:
        words = _hash(key, ids)
        rare = np.flatnonzero(words >= np.uint64(_least_bits(most + UNLIKELY)))
        others = scaled[rare] + _noise(words[rare])
        if others.size and others.max() > most:
            return int(ids[rare[others.argmax()]])
    return int(ids[likely[best]])


def _least_bits(noise: float) -> int:
    """The least hash, of `NOISE_BITS` bits, that may make more noise than this; rather too little than too much."""
    above = -math.expm1(-math.exp(-noise))  # the probability of more
    return max(0, math.floor((1.0 - above) * 2.0**NOISE_BITS) - 2 - math.ceil(above * 2.0 ** (NOISE_BITS - 40)))


def gumbel_noise(seed: int, position: int, ids: Ids) -> NDArray[np.float64]:
    """Standard Gumbel noise of each token, the same whenever and wherever it is asked for."""
    return _noise(_hash(_key(seed, position), ids))


def _noise(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Of hashes of `NOISE_BITS` bits; grows with them."""
    uniform = words + 0.5
    uniform *= 2.0**-NOISE_BITS
    np.log(uniform, out=uniform)
    np.negative(uniform, out=uniform)
    np.log(uniform, out=uniform)
    return np.negative(uniform, out=uniform)


def _key(seed: int, position: int) -> int:
    return _mix(_mix(seed) + position)


def _mix(word: int) -> int:
    """One output of SplitMix64 for one state, in Python's integers."""
    word = (word + GOLDEN) & WORD
    word = ((word ^ (word >> 30)) * MIX_1) & WORD
    word = ((word ^ (word >> 27)) * MIX_2) & WORD
    return word ^ (word >> 31)


def _hash(key: int, ids: Ids) -> NDArray[np.uint64]:
    """The upper bits of outputs number `ids` of the SplitMix64 generator that starts at `key`."""
    words = ids.astype(np.uint64)
    words *= np.uint64(GOLDEN)
    words += np.uint64(key)
    shifted = words >> np.uint64(30)
    words ^= shifted
    words *= np.uint64(MIX_1)
    words ^= np.right_shift(words, np.uint64(27), out=shifted)
    words *= np.uint64(MIX_2)
    words ^= np.right_shift(words, np.uint64(31), out=shifted)
    return np.right_shift(words, np.uint64(64 - NOISE_BITS), out=words)


def _scale(logits: Row, best: float, temperature: float) -> Scaled:
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -infinity, as it should
        scaled = logits - np.float32(best)
        return np.divide(scaled, np.float32(min(max(temperature, TEMPERATURE_MIN), TEMPERATURE_MAX)), out=scaled)


def _top_p(ids: Ids, scaled: Scaled, mass: float) -> tuple[Ids, Scaled]:
    """The fewest best tokens that hold `mass` of the probability, at least one, and those equal to the last of them.

    Tokens under `(1 - mass) / count` of it hold less than `1 - mass` together, so none of them can be needed; what is
    left is few enough to sort.
    """
    if not mass < 1.0:
        return ids, scaled
    weights = np.exp(scaled)
    total = float(weights.sum(dtype=np.float64))
    share = total * (1.0 - max(mass, 0.0)) / scaled.size
    few = np.sort(scaled[weights >= min(share, 1.0)])[::-1]
    last = int(np.searchsorted(np.cumsum(np.exp(few.astype(np.float64))), mass * total))
    return _above(ids, scaled, float(few[min(last, few.size - 1)]))


def _floor(min_p: float) -> float:
    """How far below the best a token may be: by `min_p`, and by what noise can make up for."""
    return max(math.log(min(min_p, 1.0)), -NOISE_SPAN) if min_p > 0 else -NOISE_SPAN


def _above(ids: Ids, scaled: Scaled, floor: float) -> tuple[Ids, Scaled]:
    kept = np.flatnonzero(scaled >= floor)
    return (ids, scaled) if kept.size == ids.size else (ids[kept], scaled[kept])


class History:
    """The tokens that the penalties of one request look at.

    The repetition penalty counts prompt and generated tokens (Keskar et al., "CTRL", 2019, as in `generate`);
    presence and frequency penalties count the generated ones only (OpenAI's definition, as vLLM has it).
    """

    def __init__(self, vocabulary_size: int, prompt_ids: Sequence[int], generated_ids: Sequence[int]) -> None:
        self._seen = np.zeros(vocabulary_size, np.bool_)
        self._counts = np.zeros(vocabulary_size, np.int32)
        self._seen[list(prompt_ids)] = True
        for token_id in generated_ids:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        self._seen[token_id] = True
        self._counts[token_id] += 1

    def penalize(self, logits: Row, sampling: Sampling) -> Row:
        """A copy of `logits` with the penalties taken off."""
        ids = np.flatnonzero(self._seen)
        values = logits[ids].astype(np.float64)
        counts = self._counts[ids]
        factor = _bounded(sampling.repetition_penalty)
        if factor > 0:  # anything else has no meaning
            values = np.where(values > 0, values / factor, values * factor)
        values -= _bounded(sampling.frequency_penalty) * counts
        values -= _bounded(sampling.presence_penalty) * (counts > 0)
        penalized = logits.copy()
        penalized[ids] = np.clip(values, -LOGIT_MAX, LOGIT_MAX)
        return penalized


def _bounded(penalty: float) -> float:
    return 0.0 if math.isnan(penalty) else min(max(penalty, -LOGIT_MAX), LOGIT_MAX)
