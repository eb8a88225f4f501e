"""Which KV slots are free, and what they still hold from the request before.

Keys and values depend on nothing but the tokens up to their position, so a request that begins with the tokens of a
free slot takes up where they part. A conversation's next turn then costs only what is new in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass
class Slot:
    index: int
    tokens: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    freed: int = 0  # when it was freed, in a count of its own


def shared_length(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    """How many tokens both begin with."""
    length = min(first.size, second.size)
    parts = np.flatnonzero(first[:length] != second[:length])
    return int(parts[0]) if parts.size else length


class Slots:
    def __init__(self, count: int) -> None:
        self._free = [Slot(index) for index in range(count)]
        self._freed = 0

    @property
    def is_any_free(self) -> bool:
        return bool(self._free)

    def take(self, tokens: Sequence[int]) -> tuple[int, int]:
        """A free slot, and how many of `tokens` it holds: never all, since the last one's logits are wanted. The one
        that holds most; of equal ones, that which has been free for longest.
        """
        wanted = np.asarray(tokens[:-1], np.int64)
        held = [shared_length(slot.tokens, wanted) for slot in self._free]
        best = max(range(len(held)), key=lambda place: (held[place], -self._free[place].freed))
        return self._free.pop(best).index, held[best]

    def give_back(self, index: int, tokens: Sequence[int]) -> None:
        """Frees a slot whose cache holds `tokens`."""
        self._freed += 1
        self._free.append(Slot(index, np.asarray(tokens, np.int64), self._freed))
