"""Which KV slots are free, and what they still hold from the request before.

Keys and values depend on nothing but the tokens up to their position. So a request that begins with the tokens of a
free slot takes up where they part, and what any other slot holds more of it is copied: hundreds of tokens take no
longer to copy than one to compute. A conversation's next turn then costs only what is new in it, and of a beginning
that many share, all but the first get a copy.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
Shared = tuple[int, int]  # a slot, and how many tokens it shares


@dataclass(eq=False)
class Slot:
    index: int
    tokens: Tokens = field(default_factory=lambda: np.empty(0, np.int64))
    freed: int = 0  # when it was freed, in a count of its own


def shared_length(first: Tokens, second: Tokens) -> int:
    """How many tokens both begin with."""
    length = min(first.size, second.size)
    parts = np.flatnonzero(first[:length] != second[:length])
    return int(parts[0]) if parts.size else length


def most_shared(wanted: Sequence[int], held: Iterable[tuple[int, Sequence[int] | Tokens]], known: int) -> Shared:
    """Which of the slots `held` has most of `wanted`, and how much; a length of `known` if none has more than that."""
    best, length, tokens = -1, known, np.asarray(wanted, np.int64)
    for index, others in held:
        if len(others) > length < len(tokens) and others[length] == tokens[length]:
            shared = shared_length(np.asarray(others, np.int64), tokens)
            best, length = (index, shared) if shared > length else (best, length)
    return best, length


class Slots:
    def __init__(self, count: int) -> None:
        self._count = count
        self._free = [Slot(index) for index in range(count)]
        self._freed = 0

    @property
    def is_any_free(self) -> bool:
        return bool(self._free)

    def held(self) -> list[tuple[int, Tokens]]:
        """The free ones, and the tokens that their caches hold."""
        return [(slot.index, slot.tokens) for slot in self._free]

    def take(self, tokens: Sequence[int]) -> tuple[int, int]:
        """A free slot, and how many of `tokens` it holds: never all, since the last one's logits are wanted.

        It is the one that holds most, if at least half of what it holds is used: else a greeting would cost somebody
        a long conversation that begins with the same words. Then it is one between slots that are taken, or beside one,
        since an engine reads the weights once for neighbours; of several, that which has been free for longest.
        """
        wanted = np.asarray(tokens[:-1], np.int64)
        shared = {slot.index: shared_length(slot.tokens, wanted) for slot in self._free}
        used = [slot for slot in self._free if 0 < slot.tokens.size <= 2 * shared[slot.index]]
        best = max(
            used or self._free,
            key=lambda slot: (shared[slot.index] if used else self._neighbours(slot.index), -slot.freed),
        )
        self._free.remove(best)
        return best.index, shared[best.index]

    def give_back(self, index: int, tokens: Sequence[int]) -> None:
        """Frees a slot whose cache holds `tokens`."""
        self._freed += 1
        self._free.append(Slot(index, np.asarray(tokens, np.int64), self._freed))

    def _neighbours(self, index: int) -> int:
        """How many of the slots beside it are taken."""
        free = {slot.index for slot in self._free}
        return sum(0 <= each < self._count and each not in free for each in (index - 1, index + 1))
