"""What it is worth to guess the next tokens of a sequence, by how well it went lately. Pure.

One pass over the weights then yields several tokens. Each guess is kept only if it is the very token that the sampler
picks by the logits of its own place, so nothing is said that the model would not say (the check is that of Leviathan et
al., "Fast Inference from Transformers via Speculative Decoding", 2023, where a draw is a function of logits and place).
Engines round the logits of several tokens in a step and of one a little differently.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

GUESSES_MAX: Final = 7  # in a step
ROW_COST: Final = 0.3  # of a step with one token, for each further token in it
GAIN_MIN: Final = 1.1  # below that a guess is not worth its risk


class Guesses(NamedTuple):
    """What may come next: nothing, or some tokens."""

    token_ids: tuple[int, ...] = ()
    gain: float = 1.0  # tokens that a step with them is expected to yield, for the cost of a step with one
    seconds: float = 0.0  # that guessing took


class Trust:
    """How many guesses came true lately. `memory`: how much of what was learned counts after the next comparison;
    `hits` of `tries` are what is thought before.
    """

    def __init__(self, memory: float, hits: float, tries: float) -> None:
        self._memory = memory
        self._prior_hits, self._prior_tries = hits, tries
        self._hits, self._tries = 0.0, 0.0
        self._expected: Sequence[int] = ()

    @property
    def rate(self) -> float:
        return (self._hits + self._prior_hits) / (self._tries + self._prior_tries)

    def expect(self, token_ids: Sequence[int]) -> None:
        """These, from the next token on, and nothing that was expected before."""
        self._expected = token_ids

    def see(self, token_ids: Sequence[int]) -> None:
        """What came next is compared with what was expected, up to the first that differs."""
        for expected, token in zip(self._expected, token_ids, strict=False):
            self._hits = self._memory * self._hits + (expected == token)
            self._tries = self._memory * self._tries + 1
            if expected != token:
                self._expected = ()
                return
        self._expected = self._expected[len(token_ids) :]

    def best(self, most: int, cost: float) -> tuple[int, float]:
        """The number of guesses, `most` at most, by which a step yields most for what it costs, and its gain.

        `cost`: of each guess, in steps with one token. None is best where the gain is not worth the risk.
        """
        best, gain, tokens = 0, 1.0, 1.0
        for count in range(1, min(most, GUESSES_MAX) + 1):
            tokens += self.rate**count
            reached = tokens / (1 + cost * count)
            if reached > max(gain, GAIN_MIN):
                best, gain = count, reached
        return best, gain
