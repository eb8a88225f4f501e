"""Ends a text where one of its stop strings begins, though the text comes in pieces that may cut a stop string."""

from collections.abc import Sequence
from typing import NamedTuple


class StopResult(NamedTuple):
    text: str  # may be shown
    stopped: bool


class StopStrings:
    """All that `push` and `finish` return, joined, is the text up to the first place where a stop string is complete.

    Of stop strings that are complete at the same time the one that began first counts. Held back is never more than
    the longest ending of the text that a stop string could begin with.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(dict.fromkeys(filter(None, stops)))
        self._held = ""

    def push(self, text: str) -> StopResult:
        """What may be shown now that `text` has come; after a stop nothing more may be pushed."""
        self._held += text
        # By where they end, then where they begin: the answer must not hang on how the text was cut into pieces.
        found = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        end = min(found)[1] if found else len(self._held) - self._waiting()
        shown, self._held = self._held[:end], "" if found else self._held[end:]
        return StopResult(shown, stopped=bool(found))

    def finish(self) -> str:
        """What was held back, as no more text comes."""
        held, self._held = self._held, ""
        return held

    def _waiting(self) -> int:
        """Characters at the end that a stop string begins with."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._begins_a_stop(self._held[-size:])), 0)

    def _begins_a_stop(self, ending: str) -> bool:
        return any(stop.startswith(ending) for stop in self._stops)
