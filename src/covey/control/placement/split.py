"""Cuts the layers of a model into consecutive ranges, one for each budget of memory.

Work goes in proportion to the budgets; where that does not fit, a cut moves to the nearest place from which the rest
still fits. So a split is found whenever there is one for this order of budgets.
"""

from bisect import bisect_right
from typing import Final

from covey.control.placement.memory import (
    Load,
    first_bytes,
    last_bytes,
    layer_bytes,
    layer_rows,
    overhead_bytes,
)

ANSWERS_SHARE: Final = 2  # one in so many seconds goes to answers, whose tokens alone need the output matrix


def split(load: Load, budgets_bytes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The layer that each stage ends before, or None if these budgets, in this order, can't hold the model.

    Every stage gets at least one layer.
    """
    sums = _prefix_sums(load)
    rooms = [budget - overhead_bytes(load) for budget in budgets_bytes]
    if sum(rooms) < sums[-1] or min(rooms) <= 0:
        return None
    can_end = _possible_ends(sums, rooms)
    work = _work(load)
    cuts: list[int] = []
    start = 0
    for stage, room in enumerate(rooms):
        ends = [end for end in range(start + 1, _reach(sums, start, room) + 1) if can_end[stage][end]]
        if not ends:
            return None
        start = _fairest(ends, work, budgets_bytes, stage)
        cuts.append(start)
    return tuple(cuts)


def _prefix_sums(load: Load) -> list[int]:
    """Bytes of all layers before each layer; the ends of the model count with the first and the last layer."""
    count = load.card.layer_count
    sizes = [layer_bytes(load, layer) for layer in range(count)]
    sizes[0] += first_bytes(load)
    sizes[-1] += last_bytes(load)
    sums = [0]
    for size in sizes:
        sums.append(sums[-1] + size)
    return sums


def _possible_ends(sums: list[int], rooms: list[int]) -> list[list[bool]]:
    """For each stage and layer: whether the later stages can hold what lies from that layer on."""
    layer_count = len(sums) - 1
    possible = [False] * layer_count + [True]
    table = [possible]
    for room in reversed(rooms[1:]):
        after = table[0]
        table.insert(0, [any(after[start + 1 : _reach(sums, start, room) + 1]) for start in range(layer_count + 1)])
    return table


def _reach(sums: list[int], start: int, room: int) -> int:
    """The furthest layer that a stage which begins at `start` can end before."""
    return bisect_right(sums, sums[start] + room) - 1


def _work(load: Load) -> list[int]:
    """What the layers before each cut cost, in rows of weights that a token is multiplied with.

    The vocabulary counts with the last layer. A stage that had half of the layers and it as well would keep the others
    waiting: in SmolLM2 it is as much as eight layers for each token of an answer, and nothing for one of a prompt.
    """
    card = load.card
    work = [layer * layer_rows(card) for layer in range(card.layer_count + 1)]
    work[-1] += card.vocabulary_size // ANSWERS_SHARE
    return work


def _fairest(ends: list[int], work: list[int], budgets_bytes: tuple[int, ...], stage: int) -> int:
    """Of the `ends`, that one before which the share of the work is most like the share of the budgets."""
    before, total = sum(budgets_bytes[: stage + 1]), sum(budgets_bytes)
    return min(ends, key=lambda end: (abs(work[end] * total - work[-1] * before), end))
