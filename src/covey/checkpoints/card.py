"""From the header of a GGUF file to a `ModelCard`: what placement and clients need to know, without the weights.

Keys and tensor names are those of the GGUF specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
Whether an engine can compute the architecture is not asked here.
"""

import re
from collections import Counter
from collections.abc import Collection
from typing import Final

from msgspec import Struct

from covey.checkpoints import metadata as read
from covey.checkpoints.checkpoint import EMBEDDING, OUTPUT, Checkpoint, CheckpointError, TensorEntry
from covey.checkpoints.quantization import held_bytes, held_in_table_bytes, spared_bytes
from covey.checkpoints.quantizing import BITS, can_be_quantized, quantized_bytes, quantized_spared_bytes
from covey.schema.ids import ModelId
from covey.schema.model import ModelCard, ModelSource, QuantizedBytes, SparedBytes

# More than any model has; a value beyond is damage, and would only fail later and less clearly.
LAYERS_MAX: Final = 10_000
SIZE_MAX: Final = 1 << 24  # hidden, feed-forward and vocabulary sizes, and heads
CONTEXT_MAX: Final = 1 << 40

_LAYER_TENSOR: Final = re.compile(r"blk\.(\d{1,6})\.")
_EMBEDDING_PREFIXES: Final = ("token_embd", "position_embd", "token_types")


def card_from_header(header: Checkpoint, model_id: ModelId, source: ModelSource) -> ModelCard:
    """Raises `CheckpointError` that names the metadata key or tensor that is missing or absurd."""
    _expect_whole(header)
    architecture = read.text(header.metadata, "general.architecture")
    sizes = _sizes(header, architecture)
    layers, embedding, output = _bytes_by_place(header.tensors.values(), sizes.layer_count)
    return ModelCard(
        model_id=model_id,
        source=source,
        architecture=architecture,
        quantization=_main_type(header.tensors.values()),
        layer_count=sizes.layer_count,
        hidden_size=sizes.hidden,
        attention_head_count=sizes.heads,
        kv_head_count=sizes.kv_heads,
        head_size=sizes.head,
        feed_forward_size=sizes.feed_forward,
        vocabulary_size=sizes.vocabulary,
        context_length_max=sizes.context,
        file_bytes=header.file_bytes,
        layer_bytes=layers,
        embedding_bytes=embedding,
        output_bytes=output,
        spared=_spared(header.tensors.values(), sizes.layer_count),
        quantized=_quantized(header.tensors.values(), sizes.layer_count),
    )


class _Sizes(Struct, frozen=True):
    layer_count: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    feed_forward: int
    vocabulary: int
    context: int


def _expect_whole(header: Checkpoint) -> None:
    parts = header.metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise CheckpointError(
            f"the model file is one of {parts} parts ('split.count'); join them with llama-gguf-split --merge first"
        )


def _sizes(header: Checkpoint, architecture: str) -> _Sizes:
    values = header.metadata
    hidden = read.count(values, f"{architecture}.embedding_length", SIZE_MAX)
    heads = read.count(values, f"{architecture}.attention.head_count", SIZE_MAX)
    return _Sizes(
        layer_count=read.count(values, f"{architecture}.block_count", LAYERS_MAX),
        hidden=hidden,
        heads=heads,
        kv_heads=_count_or(header, f"{architecture}.attention.head_count_kv", heads),
        head=_head_size(header, architecture, hidden, heads),
        feed_forward=_feed_forward(header, architecture),
        vocabulary=_vocabulary(header, architecture, hidden),
        context=read.count(values, f"{architecture}.context_length", CONTEXT_MAX),
    )


def _count_or(header: Checkpoint, key: str, default: int) -> int:
    return read.count(header.metadata, key, SIZE_MAX) if key in header.metadata else default


def _head_size(header: Checkpoint, architecture: str, hidden: int, heads: int) -> int:
    key = f"{architecture}.attention.key_length"
    if key not in header.metadata and hidden < heads:
        raise CheckpointError(
            f"the model file is damaged: its '{architecture}.attention.head_count' of {heads} is above its "
            f"'{architecture}.embedding_length' of {hidden}"
        )
    return _count_or(header, key, hidden // heads)


def _feed_forward(header: Checkpoint, architecture: str) -> int:
    """A model that has nothing but experts may state the size of one expert alone."""
    key, expert_key = f"{architecture}.feed_forward_length", f"{architecture}.expert_feed_forward_length"
    stated_key = expert_key if key not in header.metadata and expert_key in header.metadata else key
    return read.count(header.metadata, stated_key, SIZE_MAX)


def _vocabulary(header: Checkpoint, architecture: str, hidden: int) -> int:
    """Rows of the embedding; they must agree with what the metadata says, since the tokens index them."""
    embedding = header.tensors.get(EMBEDDING)
    if embedding is None:
        raise CheckpointError(f"the model file has no tensor {EMBEDDING!r}, so it is no complete language model")
    if len(embedding.shape) != 2 or embedding.shape[1] != hidden:  # noqa: PLR2004  # rows and columns
        raise CheckpointError(
            f"the model file is damaged: {EMBEDDING!r} measures {embedding.shape}, which does not fit its "
            f"'{architecture}.embedding_length' of {hidden}"
        )
    stated = _count_or(header, f"{architecture}.vocab_size", embedding.shape[0])
    if stated != embedding.shape[0]:
        raise CheckpointError(
            f"the model file is damaged: its '{architecture}.vocab_size' is {stated} but {EMBEDDING!r} has "
            f"{embedding.shape[0]} rows"
        )
    return stated


def _quantized(tensors: Collection[TensorEntry], layer_count: int) -> tuple[QuantizedBytes, ...]:
    if not any(can_be_quantized(tensor) for tensor in tensors):
        return ()
    return tuple(
        QuantizedBytes(each, *_bytes_by_place(tensors, layer_count, bits), _spared(tensors, layer_count, bits))
        for each, bits in BITS.items()
    )


def _bytes_by_place(
    tensors: Collection[TensorEntry], layer_count: int, bits: int | None = None
) -> tuple[tuple[int, ...], int, int]:
    """Bytes held of each layer, of what the first stage needs besides, and of what the last needs besides. `bits`: of
    what can be quantised; None: nothing is.
    """
    layers = [0] * layer_count
    first = last = 0
    for tensor in tensors:
        match = _LAYER_TENSOR.match(tensor.name)
        if match:
            layers[_layer_index(tensor.name, int(match[1]), layer_count)] += _held(tensor, bits)
        else:
            held = _held(tensor, bits, is_table=tensor.name == EMBEDDING)
            first += held if _belongs_to_first(tensor.name) else 0
            last += held if _belongs_to_last(tensor.name) else 0
    named = {tensor.name: tensor for tensor in tensors}
    if OUTPUT not in named:
        last += _held(named[EMBEDDING], bits)
    _expect_no_gap(layers)
    return tuple(layers), first, last


def _spared(tensors: Collection[TensorEntry], layer_count: int, bits: int | None = None) -> SparedBytes:
    layers = [0] * layer_count
    named = {tensor.name: tensor for tensor in tensors}
    for tensor in tensors:
        match = _LAYER_TENSOR.match(tensor.name)
        if match:
            layers[int(match[1])] += _spared_of(tensor, bits)
    return SparedBytes(tuple(layers), _spared_of(named.get(OUTPUT, named[EMBEDDING]), bits))


def _spared_of(tensor: TensorEntry, bits: int | None) -> int:
    if bits is not None and can_be_quantized(tensor):
        return quantized_spared_bytes(tensor, bits)
    return spared_bytes(tensor)


def _held(tensor: TensorEntry, bits: int | None, *, is_table: bool = False) -> int:
    if bits is not None and can_be_quantized(tensor):
        return quantized_bytes(tensor, bits, is_multiplied=not is_table)
    return held_in_table_bytes(tensor) if is_table else held_bytes(tensor)


def _belongs_to_first(name: str) -> bool:
    """What is of neither end (rope factors, say) any stage may need, so both ends count it."""
    return not name.startswith("output")


def _belongs_to_last(name: str) -> bool:
    return not name.startswith(_EMBEDDING_PREFIXES)


def _layer_index(name: str, layer: int, layer_count: int) -> int:
    if layer >= layer_count:
        raise CheckpointError(
            f"the model file is damaged: it has a tensor {name!r} but its metadata ('block_count') says that it has "
            f"{layer_count} layers"
        )
    return layer


def _expect_no_gap(layers: list[int]) -> None:
    if 0 in layers:
        raise CheckpointError(
            f"the model file is damaged: its metadata ('block_count') says that it has {len(layers)} layers, "
            f"but layer {layers.index(0)} has no tensors"
        )


def _main_type(tensors: Collection[TensorEntry]) -> str:
    bytes_by_type: Counter[str] = Counter()
    for tensor in tensors:
        bytes_by_type[tensor.type] += tensor.byte_count
    return max(sorted(bytes_by_type), key=lambda name: bytes_by_type[name])
