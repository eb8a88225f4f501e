"""`place`: a pipeline for a model on the nodes that are here, or the reason why there is none.

Where several ranks are to share each layer, as many nodes as there are ranks take the place of one: their *group* has
room for what each of them has room for, so those of one machine, or else of much the same memory, are put together.

The fewest nodes that hold the model are used (each link costs time per token), preferring those with most memory. The
head is the node that asked, if it is among them: prompts most likely come in there and tokens go back there, which
saves a hop. Else it is the node with most memory, since the head does the scheduling beside its layers.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations, islice
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from covey.control.placement import refusal
from covey.control.placement.memory import Load, load_of_draft, shard_bytes, weight_bytes, weight_sizes, whole_bytes
from covey.control.placement.nodes import Candidate, among, budgets_bytes, ranked
from covey.control.placement.split import split
from covey.schema.cluster import RANKS_MAX, Refused
from covey.schema.ids import NodeId
from covey.schema.model import KvCacheType, ModelCard, Quantizing, Shard

CONTEXT_LENGTH_DEFAULT: Final = 8_192  # tokens; more only if somebody asks for it
CONTEXT_LENGTH_LEAST: Final = 1_024  # a chat needs at least this; below it a refusal serves people better
SLOT_COUNT_DEFAULT: Final = 4
DRAFT_VOCABULARY_APART_MAX: Final = 1_024  # token ids: models of one family pad theirs to different multiples
DRAFT_WEIGHTS_SHARE: Final = 2  # a draft of one in so many weight bytes guesses no faster than the model answers
SPLITS_TRIED_MAX: Final = 200  # for one count of nodes, of all sets in all orders; the best come first


class Options(Struct, frozen=True, kw_only=True):
    """What was asked for beside the model; None and empty mean that the placement chooses."""

    node_count_min: int = 1
    context_length: int | None = None
    slot_count: int | None = None
    node_ids: tuple[NodeId, ...] = ()
    asked_at: NodeId | None = None
    quantize: Quantizing | None = None
    exact: bool = False
    rank_count: int = 1  # how many nodes share each layer
    draft: ModelCard | None = None  # the head holds it, too
    kv_cache: KvCacheType = KvCacheType.F32


class Part(Struct, frozen=True):
    """One runner to be: a node, its layers, the memory counted for them, and its rank among those with these layers."""

    node_id: NodeId
    shard: Shard
    memory_bytes: int
    rank: int = 0


class Placement(Struct, frozen=True):
    """A pipeline in order of layers and ranks, the head first, and what was chosen for its KV cache."""

    parts: tuple[Part, ...]
    context_length: int
    slot_count: int
    rank_count: int = 1
    draft: ModelCard | None = None  # the one that it has room for


Group = Sequence[Candidate]  # the nodes that share a stage, in order of rank


def place(card: ModelCard, nodes: Sequence[Candidate], options: Options) -> Placement | Refused:
    """The placement for `card`, the same for the same arguments in any order of `nodes`."""
    allowed = among(nodes, options.node_ids)
    slot_count = SLOT_COUNT_DEFAULT if options.slot_count is None else options.slot_count
    lengths = _context_lengths(card, options)
    load = Load(
        card, lengths[0], slot_count, options.quantize, options.exact, options.rank_count, options.draft,
        options.kv_cache,
    )  # fmt: skip
    refused = (
        _refuse_load(load)
        or _refuse_draft(load)
        or _refuse_ranks(card, options)
        or _refuse_nodes(load, nodes, allowed, options)
    )
    if refused:
        return refused
    for length in lengths:
        found = _place_with(replace(load, context_length=length), allowed, options)
        if found:
            return Placement(found, length, slot_count, options.rank_count, options.draft)
    least = replace(load, context_length=lengths[-1])
    fitting = next((each for each in _smaller(least) if _place_with(each, allowed, options)), None)
    halved = replace(least, kv_cache=KvCacheType.F16)
    fits_halved = halved != least and _place_with(halved, allowed, options) is not None
    return refusal.too_little_memory(least, allowed, _stage_count_min(options), fitting, fits_halved=fits_halved)


def _stage_count_min(options: Options) -> int:
    return max(-(-options.node_count_min // options.rank_count), 1)


def _smaller(load: Load) -> Iterator[Load]:
    """Without the draft; of half the slots, and half of that; then of half the context; then of that in one slot; and
    all this without the draft.
    """
    if load.draft:
        yield replace(load, draft=None)
    lengths = list(_halves(load.context_length, CONTEXT_LENGTH_LEAST))
    yield from (replace(load, slot_count=count) for count in _halves(load.slot_count, 1))
    yield from (replace(load, context_length=length) for length in lengths)
    if load.slot_count > 1:
        yield from (replace(load, context_length=length, slot_count=1) for length in lengths)
    if load.draft:
        yield from _smaller(replace(load, draft=None))


def _halves(count: int, least: int) -> Iterator[int]:
    while count // 2 >= least:
        count //= 2
        yield count


def _refuse_load(load: Load) -> Refused | None:
    if load.quantize and weight_sizes(load) is load.card:
        return refusal.nothing_to_quantize(load.card, load.quantize)
    sizes = weight_sizes(load)
    counts = {len(sizes.layer_bytes)} | ({len(sizes.spared.layer_bytes)} if sizes.spared else set())
    if {load.card.layer_count} != counts or 0 in counts:
        return refusal.odd_card(load.card, min(counts))
    if not (refusal.CONTEXT_LENGTH_MIN <= load.context_length <= load.card.context_length_max and load.slot_count >= 1):
        return refusal.odd_sizes(load)
    return None


def _refuse_draft(load: Load) -> Refused | None:
    if load.draft is None:
        return None
    if load.card.model_id == load.draft.model_id or load.card.source == load.draft.source:
        return refusal.draft_of_itself(load.card)
    return _refuse_to_guess(load, load.draft)


def _refuse_to_guess(load: Load, draft: ModelCard) -> Refused | None:
    """Why the one model can't guess for the other."""
    if draft.layer_count != len(draft.layer_bytes) or not draft.layer_bytes:
        return refusal.odd_card(draft, len(draft.layer_bytes))
    if abs(draft.vocabulary_size - load.card.vocabulary_size) > DRAFT_VOCABULARY_APART_MAX:
        return refusal.draft_of_other_words(load.card, draft)
    if DRAFT_WEIGHTS_SHARE * weight_bytes(load_of_draft(load, draft)) >= weight_bytes(load):
        return refusal.draft_too_large(load.card, draft)
    if load.context_length > draft.context_length_max:
        return refusal.draft_too_short(load.context_length, draft)
    return None


def _refuse_ranks(card: ModelCard, options: Options) -> Refused | None:
    """`node_count_min` 1 is what nobody has to ask for."""
    ranks, nodes = options.rank_count, options.node_count_min
    if not 1 <= ranks <= RANKS_MAX:
        return refusal.odd_ranks(ranks)
    if nodes > 1 and nodes % ranks:
        return refusal.nodes_without_rank(nodes, ranks)
    return refusal.uneven_heads(card, ranks)


def _refuse_nodes(
    load: Load, nodes: Sequence[Candidate], allowed: Sequence[Candidate], options: Options
) -> Refused | None:
    here = {node.node_id for node in nodes}
    missing = [node_id for node_id in options.node_ids if node_id not in here]
    if missing:
        return refusal.unknown_nodes(missing)
    if not nodes:
        return refusal.no_figures()
    if _stage_count_min(options) > load.card.layer_count:
        return refusal.more_nodes_than_layers(options.node_count_min, load)
    if options.rank_count > len(allowed) >= options.node_count_min:
        return refusal.too_few_for_ranks(options.rank_count, len(allowed))
    if options.node_count_min > len(allowed):
        return refusal.too_few_nodes(options.node_count_min, len(allowed))
    return None


def _context_lengths(card: ModelCard, options: Options) -> list[int]:
    """The lengths to try, best first: what was asked for, or halves of the default down to the least useful."""
    if options.context_length is not None:
        return [options.context_length]
    trained = min(each.context_length_max for each in (card, options.draft) if each)
    length = min(trained, CONTEXT_LENGTH_DEFAULT)
    return [length, *_halves(length, CONTEXT_LENGTH_LEAST)]


def _place_with(load: Load, nodes: Sequence[Candidate], options: Options) -> tuple[Part, ...] | None:
    """The fewest nodes that hold it; counts whose best nodes together have too little are passed over."""
    preferred = ranked(nodes, options.asked_at)
    best = sorted((budgets_bytes(nodes, [node])[0] for node in nodes), reverse=True)
    ranks = options.rank_count
    for count in range(_stage_count_min(options), min(len(nodes) // ranks, load.card.layer_count) + 1):
        if sum(best[: count * ranks]) < whole_bytes(load, count):
            continue
        for groups in islice(_selections(preferred, count, options), SPLITS_TRIED_MAX):
            cuts = split(load, group_budgets_bytes(nodes, groups))
            if cuts:
                return parts_of(load, groups, cuts)
    return None


def group_budgets_bytes(nodes: Sequence[Candidate], groups: Sequence[Group]) -> tuple[int, ...]:
    """What each node of a group may take, if all these are used together."""
    left = iter(budgets_bytes(nodes, [node for group in groups for node in group]))
    return tuple(min(islice(left, len(group))) for group in groups)


def _selections(preferred: Sequence[Candidate], count: int, options: Options) -> Iterator[list[Group]]:
    """Sets of so many groups of nodes, the preferred ones first, each in several orders."""
    for chosen in combinations(preferred, count * options.rank_count):
        ordered = _in_order(chosen, options)
        yield from _orders(_groups(ordered, options.rank_count))
        if options.rank_count > 1:
            yield from _orders(_groups(_alike_together(ordered), options.rank_count))


def _groups(nodes: Sequence[Candidate], rank_count: int) -> list[Group]:
    return [nodes[start : start + rank_count] for start in range(0, len(nodes), rank_count)]


def _alike_together(ordered: Sequence[Candidate]) -> list[Candidate]:
    """The head, then the others by what is free there, beginning at the end that is nearer to what the head has."""
    head, *others = ordered
    others.sort(key=lambda node: (-node.memory_bytes_free, node.node_id))
    most, least = others[0].memory_bytes_free, others[-1].memory_bytes_free
    is_small = abs(head.memory_bytes_free - least) < abs(head.memory_bytes_free - most)
    return [head, *(reversed(others) if is_small else others)]


def _in_order(chosen: Sequence[Candidate], options: Options) -> list[Candidate]:
    """The head first; then nodes of one machine side by side, so that their link does not leave it."""
    machine_rank: dict[str, int] = {}
    for rank, node in enumerate(chosen):
        machine_rank.setdefault(node.machine_id, rank)
    head_machine = next((node.machine_id for node in chosen if node.node_id == options.asked_at), None)
    return sorted(
        chosen,
        key=lambda node: (
            node.node_id != options.asked_at,
            node.machine_id != head_machine,
            machine_rank[node.machine_id],
            node.node_id,
        ),
    )


def _orders(chosen: list[Group]) -> Iterator[list[Group]]:
    """The preferred order, then those with another first or last group: only these two hold more than layers."""
    yield chosen
    for first in range(len(chosen)):
        for last in range(len(chosen)):
            if first == last or (first == 0 and last == len(chosen) - 1):
                continue
            middle = [group for index, group in enumerate(chosen) if index not in (first, last)]
            yield [chosen[first], *middle, chosen[last]]


def parts_of(load: Load, groups: Sequence[Group], cuts: tuple[int, ...]) -> tuple[Part, ...]:
    """A stage for each group, in this order; each ends before one of the cuts."""
    starts = (0, *cuts)
    shards = [Shard(start, end, load.card.layer_count) for start, end in zip(starts, cuts, strict=False)]
    return tuple(
        Part(node.node_id, shard, shard_bytes(load, shard, rank), rank)
        for group, shard in zip(groups, shards, strict=True)
        for rank, node in enumerate(group)
    )
