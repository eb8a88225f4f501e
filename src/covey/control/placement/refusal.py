"""Why a model can't be placed, in words that say what is missing and where."""

from collections.abc import Sequence
from typing import Final

from covey.checkpoints import ranks
from covey.control.placement.memory import Load, heads_of, whole_bytes
from covey.control.placement.nodes import Candidate, machines
from covey.schema.cluster import RANKS_MAX, Refused
from covey.schema.model import ModelCard, Quantizing

CONTEXT_LENGTH_MIN: Final = 2  # one token of prompt, one of answer

CONFLICT: Final = 409
BAD_REQUEST: Final = 400
UNAVAILABLE: Final = 503
NODES_LISTED_MAX: Final = 8
HALVED: Final = "a KV cache in 16-bit floats (`--kv-cache f16`)"
GIGABYTE: Final = 1_000_000_000
MEGABYTE: Final = 1_000_000


def too_few_nodes(asked: int, here: int) -> Refused:
    return Refused(
        f"asked for {asked} nodes, {_are_here(here)}: run `covey up` on {_more(asked - here)}, or ask for fewer.",
        CONFLICT,
    )


def more_nodes_than_layers(asked: int, load: Load) -> Refused:
    card = load.card
    return Refused(
        f"asked for {asked} nodes, but {card.model_id} has only {card.layer_count} layers: ask for fewer nodes.",
        BAD_REQUEST,
    )


def too_few_for_ranks(rank_count: int, here: int) -> Refused:
    return Refused(
        f"{rank_count} ranks need {rank_count} nodes, {_are_here(here)}: "
        f"run `covey up` on {_more(rank_count - here)}, or ask for fewer ranks.",
        CONFLICT,
    )


def odd_ranks(rank_count: int) -> Refused:
    return Refused(
        f"a layer can't be shared by {rank_count} ranks: ask for a number from 1 to {RANKS_MAX}.", BAD_REQUEST
    )


def uneven_heads(card: ModelCard, rank_count: int) -> Refused | None:
    """None where its layers can be cut into so many ranks."""
    reason = ranks.refusal(card.architecture, heads_of(card), card.feed_forward_size, rank_count)
    return Refused(f"{card.model_id} can't be placed so: {reason}.", BAD_REQUEST) if reason else None


def nodes_without_rank(nodes: int, rank_count: int) -> Refused:
    return Refused(
        f"{_nodes(nodes)} can't be divided into stages of {rank_count} ranks, each of which is a node: "
        f"ask for {rank_count} nodes, or a multiple of that.",
        BAD_REQUEST,
    )


def odd_sizes(load: Load) -> Refused:
    return Refused(
        f"a context of {load.context_length} tokens in {load.slot_count} slots can't be served: {load.card.model_id} "
        f"takes {CONTEXT_LENGTH_MIN} to {load.card.context_length_max} tokens, in at least 1 slot.",
        BAD_REQUEST,
    )


def odd_card(card: ModelCard, sizes_count: int) -> Refused:
    return Refused(
        f"the card of {card.model_id} names {card.layer_count} layers and the sizes of {sizes_count}: "
        "place the model by the name of its file.",
        BAD_REQUEST,
    )


def draft_of_itself(card: ModelCard) -> Refused:
    return Refused(
        f"{card.model_id} can't be its own draft, which would not be faster: name a smaller model of its family.",
        BAD_REQUEST,
    )


def draft_of_other_words(card: ModelCard, draft: ModelCard) -> Refused:
    return Refused(
        f"{draft.model_id} can't be a draft for {card.model_id}: it knows {draft.vocabulary_size} tokens and that "
        f"{card.vocabulary_size}, so they are of different families. Name a smaller model of the same family.",
        BAD_REQUEST,
    )


def draft_too_large(card: ModelCard, draft: ModelCard) -> Refused:
    return Refused(
        f"{draft.model_id} as a draft for {card.model_id} would not be faster, since it has half of its weights or "
        "more: name one with about a tenth of them, or place the model without a draft.",
        BAD_REQUEST,
    )


def draft_too_short(context_length: int, draft: ModelCard) -> Refused:
    return Refused(
        f"the draft {draft.model_id} holds a context of {draft.context_length_max} tokens at most: ask for no more "
        f"than that instead of {context_length}, or place the model without a draft.",
        BAD_REQUEST,
    )


def nothing_to_quantize(card: ModelCard, quantize: Quantizing) -> Refused:
    return Refused(
        f"{card.model_id} has no matrices in full precision that could be rounded to {quantize}: place it without.",
        BAD_REQUEST,
    )


def no_figures() -> Refused:
    return Refused("no node has said yet how much memory it has: try again in a few seconds.", UNAVAILABLE)


def unknown_nodes(missing: Sequence[str]) -> Refused:
    return Refused(f"these nodes are not here: {', '.join(missing)}. `covey nodes` lists those that are.", CONFLICT)


def too_little_memory(
    load: Load, nodes: Sequence[Candidate], stage_count: int, fitting: Load | None = None, *, fits_halved: bool = False
) -> Refused:
    """Says what is missing in all, or that no single node can take its part, and lists the machines. `fitting`: what
    would not be too much; `fits_halved`: it would not be with keys and values in half the bytes.
    """
    needed, usable = (
        whole_bytes(load, stage_count),
        sum(each.memory_bytes_usable for each in machines(nodes).values()),
    )
    each = "; ".join(_machine_lines(nodes))
    size = f"a context of {load.context_length} tokens in {_slots(load)}"
    draft = f" with {load.draft.model_id} as its draft" if load.draft else ""
    opening = (
        f"{load.card.model_id}{draft} needs {amount(needed)} on {_nodes(stage_count * load.rank_count)} with {size}"
    )
    if needed > usable:
        lack = f"the cluster has {amount(usable)} to give, so {amount(needed - usable)} are missing"
    else:
        lack = f"the cluster has {amount(usable)} to give, but its nodes can't each hold their part"
    advice = "free memory, add a node, or choose a smaller model."
    way_out = _way_out(load, fitting, fits_halved=fits_halved)
    advice = f"{way_out} it would fit; else {advice}" if way_out else advice.capitalize()
    return Refused(f"{opening}; {lack}: {each}. {advice}", CONFLICT)


def _way_out(load: Load, fitting: Load | None, *, fits_halved: bool) -> str:
    """The beginning of a sentence; empty where there is none."""
    smaller = _smaller(fitting, load) if fitting else ""
    if not fits_halved:
        return smaller
    return f"{smaller.removesuffix(',')}, or with {HALVED}," if smaller else f"With {HALVED}"


def _smaller(fitting: Load, load: Load) -> str:
    """What of it is smaller than asked for, as the beginning of a sentence."""
    context = f"a context of {fitting.context_length} tokens"
    if fitting.context_length == load.context_length:
        sizes = _slots(fitting) if fitting.slot_count != load.slot_count else ""
    else:
        sizes = context if fitting.slot_count == load.slot_count else f"{context} in {_slots(fitting)}"
    if load.draft and not fitting.draft:
        return f"Without the draft, and with {sizes}," if sizes else "Without the draft"
    return f"With {sizes}"


def _slots(load: Load) -> str:
    return "1 slot" if load.slot_count == 1 else f"{load.slot_count} slots"


def amount(count_bytes: int) -> str:
    """A number of bytes for a person: GB with one decimal, MB below one GB."""
    if count_bytes >= GIGABYTE:
        tenths = count_bytes * 10 // GIGABYTE
        return f"{tenths // 10}.{tenths % 10} GB"
    return f"{max(0, count_bytes) // MEGABYTE} MB"


def _machine_lines(nodes: Sequence[Candidate]) -> list[str]:
    lines = [
        f"{', '.join(node.name for node in machine.nodes)} {amount(machine.memory_bytes_usable)}"
        f" of {amount(max(node.memory_bytes_total for node in machine.nodes))}"
        for machine in machines(nodes).values()
    ]
    more = len(lines) - NODES_LISTED_MAX
    return lines if more <= 0 else [*lines[:NODES_LISTED_MAX], f"and {more} more"]


def _are_here(count: int) -> str:
    return "only 1 is here" if count == 1 else f"only {count} are here"


def _more(count: int) -> str:
    return "one more device" if count == 1 else f"{count} more devices"


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"
