"""Guesses the next tokens of a sequence by looking up what followed when its last tokens stood there before.

An answer that quotes its prompt, rewrites a file or repeats itself is guessed well ("prompt lookup decoding", Saxena
2023, https://github.com/apoorvumang/prompt-lookup-decoding). Pure.

How many are guessed depends on how well it went lately. Where nothing is guessed, what would have been is compared all
the same, which costs nothing: so text that can't be guessed is not slowed down to find that out.
"""

from collections.abc import Sequence
from typing import Final

from covey.engine.guessing import GUESSES_MAX, ROW_COST, Guesses, Trust

LENGTH: Final = 3  # tokens that must have stood together before
INDEXED_MAX: Final = 32_768  # of the latest tokens; reading so many takes some 15 ms
MEMORY: Final = 0.9  # by which trust gets as high as to want 5 guesses
PRIOR: Final = (0.4, 1.4)  # hits of tries


class Lookup:
    """Of one request."""

    def __init__(self) -> None:
        self._follows: dict[tuple[int, ...], int] = {}  # where what comes after these tokens begins
        self._read = 0  # so many tokens have been looked at
        self._trust = Trust(MEMORY, *PRIOR)

    def guess(self, tokens: Sequence[int], most: int) -> Guesses:
        """What may come after `tokens`, up to `most`. `tokens` are those of last time and some more."""
        self._trust.see(tokens[self._read :])
        self._index(tokens)
        place = self._follows.get(tuple(tokens[-LENGTH:])) if len(tokens) >= LENGTH else None
        expected = () if place is None else tuple(tokens[place : place + GUESSES_MAX])
        self._trust.expect(expected)
        count, gain = self._trust.best(min(most, len(expected)), ROW_COST)
        return Guesses(expected[:count], gain)

    def _index(self, tokens: Sequence[int]) -> None:
        for place in range(max(self._read, LENGTH, len(tokens) - INDEXED_MAX), len(tokens)):
            self._follows[tuple(tokens[place - LENGTH : place])] = place
        self._read = len(tokens)
