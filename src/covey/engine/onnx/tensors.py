"""Which tensors of a model file a stage needs, and what each has to measure.

The names are those of the GGUF specification. Whether a layer has what is named here is asked before a byte of weights
is read.
"""

from collections.abc import Iterable
from typing import Final

from covey.checkpoints.checkpoint import EMBEDDING, OUTPUT, Checkpoint, CheckpointError
from covey.checkpoints.quantization import is_known, known_types
from covey.engine.contract import EngineError
from covey.engine.onnx.architecture import Architecture, Experts, LongFactors, Rotary
from covey.engine.onnx.rotary import factors_for
from covey.schema.model import Shard

OUTPUT_NORM: Final = "output_norm.weight"

Shape = tuple[int | None, ...]  # None where the file alone says it


def layer_shapes(architecture: Architecture) -> dict[str, Shape]:
    """Every tensor that each layer has, without the layer's number before its name."""
    return _norms(architecture) | _attention(architecture) | _feed_forward(architecture)


def bias_shapes(architecture: Architecture) -> dict[str, Shape]:
    """Tensors that a layer may have: a bias for each matrix."""
    matrices = _attention(architecture) | _feed_forward(architecture)
    return {
        f"{name.removesuffix('weight')}bias": shape[:-1]
        for name, shape in matrices.items()
        if name.endswith(".weight") and len(shape) > 1
    }


def needed(header: Checkpoint, architecture: Architecture, shard: Shard, context_length: int) -> list[str]:
    """The names of all tensors that the stage reads."""
    inner = list(layer_shapes(architecture))
    biases = bias_shapes(architecture)
    layers = range(shard.layer_start, shard.layer_end)
    names = [f"blk.{layer}.{name}" for layer in layers for name in inner]
    possible = (f"blk.{layer}.{name}" for layer in layers for name in biases)
    names += [name for name in possible if name in header.tensors]
    names += factor_tensors(_rotaries(architecture, shard.layer_start, shard.layer_end), context_length)
    if shard.layer_start == 0:
        names.append(EMBEDDING)
    if shard.layer_end == shard.layer_count:
        names.append(OUTPUT_NORM)
        if not (shard.layer_start == 0 and output_name(header) == EMBEDDING):
            names.append(output_name(header))
    return names


def output_name(header: Checkpoint) -> str:
    """Many models tie embedding and output."""
    return OUTPUT if OUTPUT in header.tensors else EMBEDDING


def factor_tensors(rotaries: Iterable[Rotary], context_length: int) -> list[str]:
    """The tensors with divisors of rotary frequencies."""
    found = (factors_for(rotary, context_length) for rotary in rotaries)
    return sorted({name for name in found if isinstance(name, str)})


def check(header: Checkpoint, architecture: Architecture, names: list[str]) -> None:
    """Raises `CheckpointError`, `EngineError` for what is missing, of another size or unknown."""
    shapes = layer_shapes(architecture) | bias_shapes(architecture) | _outside(architecture)
    for name in names:
        entry = header.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"the model file lacks its tensor {name!r}; it may be of an unknown kind")
        if not is_known(entry.type):
            known = ", ".join(known_types())
            raise EngineError(f"tensor {name!r} has the type {entry.type}, which can't be run; known are {known}")
        expected = shapes.get(name.split(".", 2)[-1] if name.startswith("blk.") else name)
        if expected is not None and not _fits(entry.shape, expected):
            raise CheckpointError(f"the model file is damaged: tensor {name!r} measures {entry.shape}")
    _refuse_unknown(header, architecture)


def _refuse_unknown(header: Checkpoint, architecture: Architecture) -> None:
    """A layer with a tensor that the graph would leave out would compute something else, and nobody would see."""
    known = {*layer_shapes(architecture), *bias_shapes(architecture)}
    for name in header.tensors:
        if name.startswith("blk.") and name.split(".", 2)[-1] not in known:
            raise EngineError(f"this model's layers have a tensor {name!r}, which this engine does not know")


def _norms(architecture: Architecture) -> dict[str, Shape]:
    hidden: Shape = (architecture.hidden_size,)
    found: dict[str, Shape] = {}
    if architecture.has_pre_norms:
        found |= {"attn_norm.weight": hidden, f"{architecture.feed_forward_norm}.weight": hidden}
    if architecture.has_post_norms:
        found |= {"post_attention_norm.weight": hidden, "post_ffw_norm.weight": hidden}
    if architecture.head_norms == "heads":
        found |= {f"attn_{name}_norm.weight": (architecture.head_size,) for name in "qk"}
    if architecture.head_norms == "rows":
        found |= {"attn_q_norm.weight": (architecture.query_size,), "attn_k_norm.weight": (architecture.kv_size,)}
    return found


def _attention(architecture: Architecture) -> dict[str, Shape]:
    hidden, query, key_value = architecture.hidden_size, architecture.query_size, architecture.kv_size
    found: dict[str, Shape] = {"attn_output.weight": (hidden, query)}
    if architecture.is_joined:
        found |= {"attn_qkv.weight": (query + 2 * key_value, hidden)}
    else:
        found |= {"attn_q.weight": (query, hidden)}
        found |= {f"attn_{name}.weight": (key_value, hidden) for name in "kv"}
    if architecture.has_sinks:
        found |= {"attn_sinks.weight": (architecture.head_count,)}
    return found


def _feed_forward(architecture: Architecture) -> dict[str, Shape]:
    hidden = architecture.hidden_size
    if architecture.experts is not None:
        return _experts(architecture.experts, hidden)
    found: dict[str, Shape] = {"ffn_up.weight": (None, hidden), "ffn_down.weight": (hidden, None)}
    return found if architecture.is_joined else found | {"ffn_gate.weight": (None, hidden)}


def _experts(experts: Experts, hidden: int) -> dict[str, Shape]:
    return {
        "ffn_gate_inp.weight": (experts.count, hidden),
        "ffn_gate_exps.weight": (experts.count, None, hidden),
        "ffn_up_exps.weight": (experts.count, None, hidden),
        "ffn_down_exps.weight": (experts.count, hidden, None),
    }


def _outside(architecture: Architecture) -> dict[str, Shape]:
    hidden = architecture.hidden_size
    rotaries = _rotaries(architecture, 0, architecture.layer_count)
    factors: dict[str, Shape] = {name: (each.size // 2,) for each in rotaries for name in _factor_names(each.factors)}
    return factors | {OUTPUT_NORM: (hidden,), OUTPUT: (None, hidden), EMBEDDING: (None, hidden)}


def _rotaries(architecture: Architecture, start: int, end: int) -> set[Rotary]:
    return {layer.rotary for layer in architecture.layers[start:end] if layer.rotary is not None}


def _factor_names(factors: LongFactors | str | None) -> list[str]:
    found = (factors.short, factors.long) if isinstance(factors, LongFactors) else (factors,)
    return [name for name in found if isinstance(name, str)]


def _fits(shape: tuple[int, ...], expected: Shape) -> bool:
    return len(shape) == len(expected) and all(e in (None, s) for s, e in zip(shape, expected, strict=True))
