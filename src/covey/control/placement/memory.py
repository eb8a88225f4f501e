"""How much memory a shard takes. Every constant is here, so that a measurement can correct it in one place."""

from typing import Final

from msgspec import Struct

from covey.checkpoints.ranks import Heads
from covey.schema.generation import PREFILL_CHUNK_TOKENS
from covey.schema.model import KvCacheType, ModelCard, QuantizedBytes, Quantizing, Shard, SparedBytes

MEBIBYTE: Final = 1024 * 1024
FLOAT_BYTES: Final = 4  # the onnx engine computes the scores of attention in float32 on CPUs
KV_BYTES: Final = {KvCacheType.F32: 4, KvCacheType.F16: 2}  # of each number in keys and values
HEADS_WIDENED: Final = 8  # at once, whose keys in 16 bits are made 32 for a step: one for each thread
PROGRAM_BYTES: Final = 120 * MEBIBYTE  # interpreter, libraries and other working memory of one runner process
LOADING_PERCENT: Final = 110  # of what is counted for a runner, at most, while parts of its weights are there twice
WHOLE_PERMILLE: Final = 20  # of a layer that is shared, what each rank holds for itself: norms, biases, rounding up
USABLE_PERCENT: Final = 90  # of what is free; the rest is left to the person who owns the machine


class Load(Struct, frozen=True):
    """What is to be served: the model, and the size of its KV cache."""

    card: ModelCard
    context_length: int  # tokens of one slot
    slot_count: int
    quantize: Quantizing | None = None
    exact: bool = False
    rank_count: int = 1  # how many runners share each layer; all sizes are those of one of them
    draft: ModelCard | None = None  # rank 0 of the first stage holds it whole, rounded as the model is
    kv_cache: KvCacheType = KvCacheType.F32


def weight_sizes(load: Load) -> ModelCard | QuantizedBytes:
    """The card, or what it says of them where they are quantised."""
    return next((each for each in load.card.quantized if each.quantize is load.quantize), load.card)


def kv_bytes_of_layer(load: Load) -> int:
    """Keys and values of one layer, for all slots at full length."""
    card = load.card
    token_bytes = 2 * share(card.kv_head_count, load) * card.head_size * KV_BYTES[load.kv_cache]
    return token_bytes * load.context_length * load.slot_count


def layer_bytes(load: Load, layer: int) -> int:
    """One layer: its weights and its KV cache."""
    spared = _spared(load)
    weights = weight_sizes(load).layer_bytes[layer] - (spared.layer_bytes[layer] if spared else 0)
    whole = weights * _whole_permille(load) // 1000
    return share(weights, load) + whole + kv_bytes_of_layer(load)


def heads_of(card: ModelCard) -> Heads:
    return Heads(card.attention_head_count, card.kv_head_count, card.head_size)


def _whole_permille(load: Load) -> int:
    """Of a layer's weights, what a rank holds beyond its even share: where there are more ranks than key-value heads,
    some have the same one.
    """
    if load.rank_count == 1:
        return 0
    card, keys = load.card, load.card.kv_head_count
    repeated = 2 * card.head_size * max(0, load.rank_count - keys) // load.rank_count
    return WHOLE_PERMILLE + -(-repeated * 1000 // layer_rows(card))


def layer_rows(card: ModelCard) -> int:
    """How many rows of weights, as wide as the hidden size, a token is multiplied with in a layer."""
    return 2 * card.head_size * (card.attention_head_count + card.kv_head_count) + 3 * card.feed_forward_size


def first_bytes(load: Load) -> int:
    """What rank 0 of the first stage holds beside its layers; its other ranks have no draft."""
    return weight_sizes(load).embedding_bytes + draft_bytes(load)


def draft_bytes(load: Load) -> int:
    """The draft: its weights, one slot of its KV cache, and its scores of attention. It runs in the head's program."""
    if load.draft is None:
        return 0
    alone = load_of_draft(load, load.draft)
    cache = kv_bytes_of_layer(alone) * load.draft.layer_count
    return weight_bytes(alone) + cache + overhead_bytes(alone) - PROGRAM_BYTES


def load_of_draft(load: Load, draft: ModelCard) -> Load:
    """What a draft beside `load` is: with one slot and never exact. Where the model is rounded, so is the draft's full
    precision; its cache is of the same type.
    """
    return Load(draft, load.context_length, 1, load.quantize, kv_cache=load.kv_cache)


def weight_bytes(load: Load) -> int:
    """All weights of the model as they are held, without what exact mode spares."""
    sizes = weight_sizes(load)
    return sum(sizes.layer_bytes) + sizes.embedding_bytes + sizes.output_bytes


def last_bytes(load: Load) -> int:
    """What the last stage holds beside its layers."""
    spared = _spared(load)
    return share(weight_sizes(load).output_bytes - (spared.output_bytes if spared else 0), load)


def _spared(load: Load) -> SparedBytes | None:
    return weight_sizes(load).spared if load.exact else None


def share(count: int, load: Load) -> int:
    """The most that a rank has of something that is cut in parts as even as can be."""
    return -(-count // load.rank_count)


def overhead_bytes(load: Load) -> int:
    """Of a runner, whatever layers it has: its program, and what each head makes of each token before, of the tokens of
    a step. Keys of 16 bits are widened for it, of as many heads as there are threads; more threads than are counted
    here belong to machines with memory to spare.
    """
    heads = share(load.card.attention_head_count, load)
    scores = heads * min(PREFILL_CHUNK_TOKENS, load.context_length)
    widened = min(heads, HEADS_WIDENED) * load.card.head_size if load.kv_cache is KvCacheType.F16 else 0
    return PROGRAM_BYTES + (scores + widened) * load.context_length * FLOAT_BYTES


def shard_bytes(load: Load, shard: Shard, rank: int = 0) -> int:
    """Memory of the runner that holds `shard`; of the first one, rank 0 holds most: the draft is there alone."""
    layers = sum(layer_bytes(load, layer) for layer in range(shard.layer_start, shard.layer_end))
    ends = first_bytes(load) * (shard.layer_start == 0) + last_bytes(load) * (shard.layer_end == shard.layer_count)
    return overhead_bytes(load) + layers + ends - (draft_bytes(load) if rank and shard.layer_start == 0 else 0)


def whole_bytes(load: Load, stage_count: int) -> int:
    """Memory of all runners of a pipeline of so many stages."""
    layers = sum(layer_bytes(load, layer) for layer in range(load.card.layer_count))
    one_rank = layers + first_bytes(load) + last_bytes(load) + stage_count * overhead_bytes(load)
    return load.rank_count * one_rank - (load.rank_count - 1) * draft_bytes(load)


def loading_bytes(counted_bytes: int) -> int:
    """What has to be free for a runner to load. Where a placement fitted, so does this: 110 of 90 percent are 99."""
    return counted_bytes * LOADING_PERCENT // 100


def still_to_take_bytes(counted_bytes: int, resident_bytes: int | None) -> int:
    """What a runner will still take of the memory that is free: all that was counted, until it has loaded (None).

    A loaded runner holds its weights, but the pages of its KV cache are taken as its slots fill: what it holds is read
    with what is free, else what is filled would be counted twice.
    """
    return counted_bytes if resident_bytes is None else max(counted_bytes - resident_bytes, 0)
