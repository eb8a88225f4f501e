"""Cuts the layers of a model into consecutive ranges, one for each budget of memory.

Layers go in proportion to the budgets; where that does not fit, a cut moves to the nearest place that does. A split
is found if there is one for this order of budgets: `reach` and `need` bound every cut from both sides.
"""

from covey.control.placement.memory import RUNNER_OVERHEAD_BYTES, Load, first_bytes, last_bytes, layer_bytes


def split(load: Load, budgets_bytes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The layer that each stage ends before, or None if these budgets, in this order, can't hold the model.

    Every stage gets at least one layer.
    """
    sums = _prefix_sums(load)
    layer_count, stage_count = len(sums) - 1, len(budgets_bytes)
    rooms = [budget - RUNNER_OVERHEAD_BYTES for budget in budgets_bytes]
    if not 1 <= stage_count <= layer_count:
        return None
    needed = _earliest_cuts(sums, rooms)
    if needed is None:
        return None
    cuts: list[int] = []
    start = 0
    for stage, room in enumerate(rooms):
        lowest = max(needed[stage], start + 1)
        highest = min(_reach(sums, start, room), layer_count - (stage_count - 1 - stage))
        if highest < lowest:
            return None
        start = min(max(_proportional_cut(layer_count, budgets_bytes, stage), lowest), highest)
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


def _earliest_cuts(sums: list[int], rooms: list[int]) -> list[int] | None:
    """For each stage the earliest layer it may end before, so that the later stages can hold the rest."""
    layer_count = len(sums) - 1
    cuts = [layer_count] * len(rooms)
    for stage in range(len(rooms) - 1, 0, -1):
        start = cuts[stage]
        while start > 0 and sums[cuts[stage]] - sums[start - 1] <= rooms[stage]:
            start -= 1
        if start == cuts[stage] > 0:
            return None  # not even one layer fits
        cuts[stage - 1] = start
    return cuts


def _reach(sums: list[int], start: int, room: int) -> int:
    """The furthest layer that a stage which begins at `start` can end before."""
    end = start
    while end + 1 < len(sums) and sums[end + 1] - sums[start] <= room:
        end += 1
    return end


def _proportional_cut(layer_count: int, budgets_bytes: tuple[int, ...], stage: int) -> int:
    """Where this stage would end if layers went strictly by budget, rounded to the nearest layer."""
    before, total = sum(budgets_bytes[: stage + 1]), sum(budgets_bytes)
    return (2 * layer_count * before + total) // (2 * total)
