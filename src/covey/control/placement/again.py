"""Placing an instance that is loaded already, so that as little as possible is read again.

`place_again` after a loss: what is lost is given to the nodes that are left, and what is loaded stays where it is.
`place_anew` where nothing is lost: as a new instance would be placed, with its nodes in the order that moves least.
`place_at_all` where anything is better than nothing: with fewer ranks, if as many as were asked for find no room; and
without the draft, if it can't be had with it.

A layer that moves has to be read again, gigabytes of a large model, while everybody waits. So a survivor keeps all its
layers, and takes on some of those that were lost beside them. Only where the survivors have no room for a gap between
them, or more nodes were asked for, another node takes it, whole.

What a rank holds is of use only to the same rank of as many: where ranks share layers, another node takes the very
place of one that was lost.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, islice, permutations
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from covey.control.placement.memory import Load, shard_bytes
from covey.control.placement.nodes import Candidate, among, budgets_bytes, ranked
from covey.control.placement.place import Group, Options, Part, Placement, group_budgets_bytes, parts_of, place
from covey.control.placement.split import split
from covey.schema.cluster import Instance, Refused, Stage
from covey.schema.ids import NodeId
from covey.schema.model import ModelCard, Shard

ORDERS_MAX: Final = 120  # of five nodes all


def place_anew(former: Instance, nodes: Sequence[Candidate], options: Options) -> Placement | Refused:
    """`nodes` as they would be without `former`."""
    placement = place_at_all(former.card, nodes, options)
    if isinstance(placement, Refused):
        return placement
    ranks = placement.rank_count
    load = load_of(former, placement.context_length, placement.slot_count, ranks)
    load = replace(load, draft=placement.draft)
    allowed = among(nodes, options.node_ids)
    chosen = [node for part in placement.parts for node in allowed if node.node_id == part.node_id]
    groups = [_in_former_order(former, chosen[start : start + ranks]) for start in range(0, len(chosen), ranks)]
    best = placement.parts
    for order in islice(permutations(groups), ORDERS_MAX):
        cuts = split(load, group_budgets_bytes(allowed, order))
        parts = parts_of(load, order, cuts) if cuts else placement.parts
        best = max(best, parts, key=lambda each: _kept_layers(former, each, ranks) + _kept_draft_layers(former, each))
    return replace(placement, parts=best)


def place_at_all(card: ModelCard, nodes: Sequence[Candidate], options: Options) -> Placement | Refused:
    """With the draft if there is room for it, and with the most ranks that find a place, of those that divide what was
    asked for. What that is refused with.
    """
    tried = (place(card, nodes, each) for each in _ways(options))
    first = next(tried)
    return next((each for each in chain([first], tried) if isinstance(each, Placement)), first)


def _ways(options: Options) -> Iterator[Options]:
    """As asked for, then with less and less."""
    yield options
    counts = (count for count in range(options.rank_count - 1, 0, -1) if options.rank_count % count == 0)
    yield from (with_ranks(options, count) for count in counts)
    if options.draft:
        yield from _ways(replace(options, draft=None))


def with_ranks(options: Options, rank_count: int) -> Options:
    """The same with so many ranks, and no more nodes than make whole stages of them."""
    nodes = max(options.node_count_min // rank_count * rank_count, 1)
    return replace(options, rank_count=rank_count, node_count_min=nodes)


def _in_former_order(former: Instance, group: Group) -> Group:
    """Each at the rank that it had, as far as that is to be had."""
    ranks = {stage.node_id: stage.rank for stage in former.stages}
    places: list[Candidate | None] = [None] * len(group)
    for node in group:
        rank = ranks.get(node.node_id, len(group))
        if rank < len(group) and places[rank] is None:
            places[rank] = node
    rest = iter([node for node in group if node not in places])
    return [place or next(rest) for place in places]


def _kept_layers(former: Instance, parts: Sequence[Part], rank_count: int) -> int:
    if rank_count != former.rank_count:
        return 0
    held = {(stage.node_id, stage.rank): stage.shard for stage in former.stages}
    found = [(held.get((part.node_id, part.rank)), part.shard) for part in parts]
    return sum(overlap(before, shard) for before, shard in found if before)


def _kept_draft_layers(former: Instance, parts: Sequence[Part]) -> int:
    """Of the draft, which lies at the head."""
    return former.draft.layer_count if former.draft and parts[0].node_id == former.stages[0].node_id else 0


def load_of(former: Instance, context_length: int, slot_count: int, rank_count: int = 1) -> Load:
    """The same in other sizes."""
    return Load(
        former.card, context_length, slot_count, former.quantize, former.exact, rank_count, former.draft,
        former.kv_cache,
    )  # fmt: skip


def overlap(first: Shard, second: Shard) -> int:
    """How many layers are in both."""
    return max(0, min(first.layer_end, second.layer_end) - max(first.layer_start, second.layer_start))


class _Keeper(Struct, frozen=True):
    """A node and the layers that it is to have, at least."""

    node: Candidate
    start: int
    end: int


def place_again(former: Instance, nodes: Sequence[Candidate], options: Options) -> Placement | None:
    """A placement in which every node of `former` that is among `nodes` keeps its layers; None where none fits.

    `nodes` as they would be without `former`; `options.context_length` and `slot_count` are those of `former`.
    """
    allowed = {node.node_id: node for node in among(nodes, options.node_ids)}
    if options.rank_count != former.rank_count:
        return None
    if former.rank_count > 1:
        return _with_places_taken(former, allowed, options)
    kept = [
        _Keeper(allowed[stage.node_id], stage.shard.layer_start, stage.shard.layer_end)
        for stage in former.stages
        if stage.node_id in allowed
    ]
    load = load_of(former, former.context_length, former.slot_count)
    spare = [node for node in ranked(list(allowed.values()), options.asked_at) if node not in [k.node for k in kept]]
    if not kept:
        return None
    for newcomers in _newcomers(kept, spare, load.card.layer_count, options):
        parts = _fill(load, sorted([*kept, *newcomers], key=lambda each: each.start), list(allowed.values()))
        if parts:
            return Placement(parts, former.context_length, former.slot_count, draft=former.draft)
    return None


def _with_places_taken(former: Instance, allowed: dict[NodeId, Candidate], options: Options) -> Placement | None:
    """Every node that is left keeps its place, and others take those of the lost ones; None where they have no room."""
    if len(former.stages) < options.node_count_min:
        return None
    kept = {stage.node_id for stage in former.stages}
    spare = (node for node in ranked(list(allowed.values()), options.asked_at) if node.node_id not in kept)
    chosen = [allowed.get(stage.node_id) or next(spare, None) for stage in former.stages]
    found = [node for node in chosen if node]
    if len(found) < len(former.stages) or not _has_room(found, former.stages, list(allowed.values())):
        return None
    parts = tuple(
        Part(node.node_id, stage.shard, stage.memory_bytes, stage.rank)
        for node, stage in zip(found, former.stages, strict=True)
    )
    return Placement(parts, former.context_length, former.slot_count, former.rank_count, former.draft)


def _has_room(chosen: Sequence[Candidate], stages: Sequence[Stage], nodes: Sequence[Candidate]) -> bool:
    budgets = budgets_bytes(nodes, chosen)
    return all(stage.memory_bytes <= budget for stage, budget in zip(stages, budgets, strict=True))


def _newcomers(
    kept: Sequence[_Keeper], spare: Sequence[Candidate], layer_count: int, options: Options
) -> Iterator[list[_Keeper]]:
    """None, unless more nodes were asked for; then each spare node for each gap; then one for every gap."""
    gaps = _gaps(kept, layer_count)
    if len(kept) >= options.node_count_min:
        yield []
    if len(kept) + 1 >= options.node_count_min:
        yield from ([_Keeper(node, *gap)] for gap in gaps for node in spare)
    if len(gaps) > 1 and len(spare) >= len(gaps):
        yield [_Keeper(node, *gap) for node, gap in zip(spare, gaps, strict=False)]


def _gaps(kept: Sequence[_Keeper], layer_count: int) -> list[tuple[int, int]]:
    """The ranges of layers that nobody has, longest first."""
    ends = [0, *(each.end for each in kept)]
    starts = [*(each.start for each in kept), layer_count]
    gaps = [(end, start) for end, start in zip(ends, starts, strict=True) if end < start]
    return sorted(gaps, key=lambda gap: gap[0] - gap[1])


def _fill(load: Load, keepers: Sequence[_Keeper], nodes: Sequence[Candidate]) -> tuple[Part, ...] | None:
    """Cuts each gap in the middle of where its neighbours' room allows a cut; None where it allows none."""
    budgets = budgets_bytes(nodes, [each.node for each in keepers])
    starts, ends = [each.start for each in keepers], [each.end for each in keepers]
    count = load.card.layer_count

    def fits(index: int, start: int, end: int) -> bool:
        return shard_bytes(load, Shard(start, end, count)) <= budgets[index]

    for index in range(len(keepers) + 1):
        before, after = index - 1, index
        gap_start = ends[before] if before >= 0 else 0
        gap_end = starts[after] if after < len(keepers) else count
        cuts = [
            cut
            for cut in range(gap_start, gap_end + 1)
            if (fits(before, starts[before], cut) if before >= 0 else cut == gap_start)
            and (fits(after, cut, ends[after]) if after < len(keepers) else cut == gap_end)
        ]
        if not cuts:
            return None
        cut = cuts[len(cuts) // 2]
        if before >= 0:
            ends[before] = cut
        if after < len(keepers):
            starts[after] = cut
    shards = [Shard(start, end, count) for start, end in zip(starts, ends, strict=True)]
    return tuple(
        Part(each.node.node_id, shard, shard_bytes(load, shard)) for each, shard in zip(keepers, shards, strict=True)
    )
