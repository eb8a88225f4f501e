"""Guesses the next tokens of a sequence by looking up what followed when its last tokens stood there before.

An answer that quotes its prompt, rewrites a file or repeats itself is guessed well, and one pass over the weights then
yields several tokens ("prompt lookup decoding", Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding; the
check is that of Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023). Each guess is
kept only if it is the very token that the sampler picks by the logits of its own place, so nothing is said that the
model would not say. (Engines round the logits of several tokens in a step and of one a little differently.) Pure.

How many are guessed depends on how well it went lately. Where nothing is guessed, what would have been is compared all
the same, which costs nothing: so text that can't be guessed is not slowed down to find that out.
"""

from collections.abc import Sequence
from typing import Final

LENGTH: Final = 3  # tokens that must have stood together before
GUESSES_MAX: Final = 7  # in a step; the trust that `MEMORY` allows wants 5
INDEXED_MAX: Final = 32_768  # of the latest tokens; reading so many takes some 15 ms
ROW_COST: Final = 0.3  # of a step with one token, for each further token in it
GAIN_MIN: Final = 1.1  # below that a guess is not worth its risk
MEMORY: Final = 0.9  # how much of what was learned still counts after the next comparison
PRIOR_HITS: Final = 0.4  # what is thought before anything was compared
PRIOR_TRIES: Final = 1.4


class Lookup:
    """Of one request."""

    def __init__(self) -> None:
        self._follows: dict[tuple[int, ...], int] = {}  # where what comes after these tokens begins
        self._read = 0  # so many tokens have been looked at
        self._expected: Sequence[int] = ()  # what would come next
        self._hits, self._tries = 0.0, 0.0

    def guess(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        """What may come after `tokens`: nothing, or up to `most`. `tokens` are those of last time and some more."""
        self._compare(tokens)
        self._index(tokens)
        place = self._follows.get(tuple(tokens[-LENGTH:])) if len(tokens) >= LENGTH else None
        self._expected = () if place is None else tuple(tokens[place : place + GUESSES_MAX])
        count = min(self._best_count(), most)
        return tuple(self._expected[:count])

    def _compare(self, tokens: Sequence[int]) -> None:
        """What was expected last time with what came; it ends with the first that differs."""
        for expected, token in zip(self._expected, tokens[self._read :], strict=False):
            self._hits = MEMORY * self._hits + (expected == token)
            self._tries = MEMORY * self._tries + 1
            if expected != token:
                break

    def _index(self, tokens: Sequence[int]) -> None:
        for place in range(max(self._read, LENGTH, len(tokens) - INDEXED_MAX), len(tokens)):
            self._follows[tuple(tokens[place - LENGTH : place])] = place
        self._read = len(tokens)

    def _best_count(self) -> int:
        """The number of guesses by which a step is expected to yield most for what it costs."""
        trust = (self._hits + PRIOR_HITS) / (self._tries + PRIOR_TRIES)
        best, gain, tokens = 0, GAIN_MIN, 1.0
        for count in range(1, GUESSES_MAX + 1):
            tokens += trust**count
            if tokens / (1 + ROW_COST * count) > gain:
                best, gain = count, tokens / (1 + ROW_COST * count)
        return best
