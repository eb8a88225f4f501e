"""Into how many ranks a model's layers can be cut, and what of a layer each rank has.

Attention is cut between heads. Query heads belong to key-value heads in groups: either each rank has whole groups, or
a group is shared by several ranks, which all hold its keys and values. Feed-forward is cut along its inner size.
"""

from typing import Final

from msgspec import Struct

COLUMNS: Final = 16  # a matrix in blocks is cut at multiples of this many columns: what the kernels' smallest block has
# Norms of these go over the values of all heads together, which no rank has.
WHOLE_ARCHITECTURES: Final = ("olmo2",)


class Heads(Struct, frozen=True):
    """What attention is made of."""

    query_count: int
    kv_count: int
    size: int  # values of a head


def rank_counts(architecture: str, heads: Heads, feed_forward_size: int) -> tuple[int, ...]:
    """All counts that the model can be cut into; 1 always is one."""
    if architecture in WHOLE_ARCHITECTURES:
        return (1,)
    most = min(heads.query_count, max(feed_forward_size // COLUMNS, 1))
    return tuple(count for count in range(1, most + 1) if count == 1 or _can_be_cut(heads, count))


def refusal(architecture: str, heads: Heads, feed_forward_size: int, asked: int) -> str | None:
    """Why it can't be cut into `asked` ranks, as a sentence without its end; None where it can."""
    counts = rank_counts(architecture, heads, feed_forward_size)
    if asked in counts:
        return None
    if architecture in WHOLE_ARCHITECTURES:
        return f"models of the architecture {architecture} can't be cut into ranks, since they norm all heads together"
    possible = " or ".join(map(str, counts[1:])) or "none but 1"
    return (
        f"a model with {heads.query_count} query heads, {heads.kv_count} key-value heads and an inner size of "
        f"{feed_forward_size} can't be cut into {asked} ranks; possible is {possible}"
    )


def query_heads(heads: Heads, rank: int, count: int) -> range:
    own = heads.query_count // count
    return range(rank * own, (rank + 1) * own)


def kv_heads(heads: Heads, rank: int, count: int) -> range:
    """Where there are more ranks than these heads, neighbouring ranks have the same one."""
    if count > heads.kv_count:
        shared = rank * heads.kv_count // count
        return range(shared, shared + 1)
    own = heads.kv_count // count
    return range(rank * own, (rank + 1) * own)


def portion(size: int, unit: int, rank: int, count: int) -> range:
    """Of `size` numbers, cut at multiples of `unit` into parts as equal as can be."""
    units = -(-size // unit)
    return range(min(units * rank // count * unit, size), min(units * (rank + 1) // count * unit, size))


def _can_be_cut(heads: Heads, count: int) -> bool:
    if heads.query_count % count or heads.query_count // count * heads.size % COLUMNS:
        return False
    return heads.kv_count % count == 0 or count % heads.kv_count == 0
