"""The plain Llama, which the others depart from, and what needs no more than it.

GGUF files of Llama 2 and 3, Mistral, SmolLM 2 and Mixtral all carry its name. SmolLM 3 has one of its own.
"""

from typing import Any, Final

from msgspec.structs import replace

from covey.checkpoints.checkpoint import CheckpointError
from covey.engine.contract import EngineError
from covey.engine.onnx.architecture import (
    Architecture,
    Experts,
    LayerArchitecture,
    Llama3Scaling,
    LongFactors,
    Rotary,
    YarnScaling,
)
from covey.engine.onnx.rotary import long_magnitude, yarn_magnitude
from covey.engine.onnx.stated import Stated

ROPE_SCALINGS: Final = ("none", "linear", "llama3", "yarn", "longrope")
DIVISORS: Final = "rope_freqs.weight"
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
HEAD_MULTIPLE: Final = 16  # what the attention operator turns
SOFTMAX: Final = 1  # of the functions that choose experts
SOFTMAXES: Final = (
    SOFTMAX,
    3,
)  # over all, or over the chosen: the same where shares add up to 1
SMOLLM3_PERIOD: Final = 4  # one in four layers is not turned; GGUF has no key for it


def llama(stated: Stated) -> Architecture:
    """Weights of GGUF files are permuted so that neighbours are turned together."""
    return plain(stated, is_interleaved=True, experts=experts(stated))


def smollm3(stated: Stated) -> Architecture:
    found = plain(stated, is_interleaved=True)
    usual = tuple((index + 1) % SMOLLM3_PERIOD != 0 for index in range(found.layer_count))
    turned = stated.own_flags("covey.rotary_layers", found.layer_count) or usual
    layers = zip(found.layers, turned, strict=True)
    return replace(
        found, layers=tuple(layer if is_turned else replace(layer, rotary=None) for layer, is_turned in layers)
    )


def plain(stated: Stated, *, is_interleaved: bool = False, **changes: Any) -> Architecture:
    """What all families state in the same way. Raises `EngineError`, `CheckpointError`."""
    hidden_size, head_count = stated.count("embedding_length"), stated.count("attention.head_count")
    rope_size = stated.count("rope.dimension_count", None)
    head_size = stated.count("attention.key_length", rope_size or hidden_size // head_count)
    _expect_equal_heads(stated, head_size)
    table = rotary(stated, rope_size or head_size, head_size)
    found = Architecture(
        name=stated.architecture,
        hidden_size=hidden_size,
        head_count=head_count,
        kv_head_count=stated.count("attention.head_count_kv", head_count),
        head_size=head_size,
        epsilon=stated.number("attention.layer_norm_rms_epsilon"),
        layers=tuple(LayerArchitecture(window, table) for window in windows(stated)),
        is_interleaved=stated.own_flag("covey.rotary_interleaved", default=is_interleaved),
        norm_offset=stated.own_number("covey.norm_offset", 0.0),
    )
    return replace(found, **changes)


def windows(stated: Stated, *, period: int = 0, default: int | None = None) -> tuple[int, ...]:
    """For each layer how many tokens it sees, 0 for all. The last of each `period` layers sees all; 0: no period."""
    count = stated.count("block_count")
    key = "attention.sliding_window"
    window = stated.count(key) if stated.states(key) else (0 if default is None else default)
    pattern = stated.flags_or_count("attention.sliding_window_pattern", count, period)
    if isinstance(pattern, int):
        pattern = tuple(pattern == 0 or index % pattern < pattern - 1 for index in range(count))
    return tuple(window if is_windowed else 0 for is_windowed in pattern)


def rotary(stated: Stated, size: int, head_size: int) -> Rotary:
    if head_size % HEAD_MULTIPLE or size % HEAD_MULTIPLE or size > head_size:
        raise EngineError(
            f"this model rotates {size} of {head_size} values of a head; only multiples of {HEAD_MULTIPLE} are known"
        )
    kind = stated.text("rope.scaling.type", "none")
    if kind not in ROPE_SCALINGS:
        raise EngineError(f"this model scales its positions by {kind!r}; known are {', '.join(ROPE_SCALINGS)}")
    plainly = Rotary(size=size, base=stated.number("rope.freq_base", 10000.0), factors=_factors(stated, size, kind))
    if isinstance(plainly.factors, LongFactors):
        magnitude = long_magnitude(stated.count("context_length"), plainly.factors.original_context_length)
        return replace(plainly, magnitude=stated.number("rope.scaling.attn_factor", magnitude))
    return _SCALINGS[kind](stated, plainly)


def experts(stated: Stated, **changes: Any) -> Experts | None:
    """None where the model is dense."""
    if not stated.states("expert_count"):
        return None
    _expect_usual_experts(stated)
    found = Experts(count=stated.count("expert_count"), used_count=stated.count("expert_used_count"))
    if found.used_count > found.count:
        raise CheckpointError(
            f"the model file is damaged: of its {found.count} experts {found.used_count} are to be used at once"
        )
    return replace(found, **changes)


def _expect_usual_experts(stated: Stated) -> None:
    gating = stated.count("expert_gating_func", SOFTMAX)
    if gating not in SOFTMAXES:
        raise EngineError(f"this model chooses experts by the function {gating}; known is only softmax, {SOFTMAX}")
    is_normalized = stated.flag("expert_weights_norm", default=True)
    if not is_normalized or stated.number("expert_weights_scale", None) not in {None, 1.0}:
        raise EngineError("this model's shares of experts don't add up to 1; only those that do are known")


def _expect_equal_heads(stated: Stated, head_size: int) -> None:
    value_size = stated.count("attention.value_length", head_size)
    if value_size != head_size:
        raise EngineError(f"this model's heads have {head_size} key and {value_size} value sizes; only equal ones work")


def _factors(stated: Stated, size: int, kind: str) -> LongFactors | str | None:
    if stated.has_tensor(DIVISORS):
        return DIVISORS
    short, long = stated.positive_list("rope.scaling.short_factor"), stated.positive_list("rope.scaling.long_factor")
    if short is not None and long is not None:
        if {len(short), len(long)} != {size // 2}:
            raise CheckpointError(f"the model file is damaged: its long rope factors are not {size // 2} each")
        return LongFactors(short, long, _original_context(stated))
    if stated.has_tensor(SHORT_FACTORS) and stated.has_tensor(LONG_FACTORS):
        return LongFactors(SHORT_FACTORS, LONG_FACTORS, _original_context(stated))
    if kind == "longrope":
        raise CheckpointError(f"the model file lacks its tensors {SHORT_FACTORS!r} and {LONG_FACTORS!r}")
    return None


def _original_context(stated: Stated) -> int:
    return stated.count("rope.scaling.original_context_length", stated.count("context_length"))


def _unscaled(_stated: Stated, found: Rotary) -> Rotary:
    return found


def _linear(stated: Stated, found: Rotary) -> Rotary:
    key = "rope.scaling.factor" if stated.states("rope.scaling.factor") else "rope.scale_linear"
    return replace(found, divisor=stated.number(key))


def _llama3(stated: Stated, found: Rotary) -> Rotary:
    """GGUF files hold the divisors as a tensor; these keys are of formats that are opened as if they were GGUF."""
    if found.factors is not None:
        return found
    scaling = Llama3Scaling(
        factor=stated.number("rope.scaling.factor"),
        low=stated.number("rope.scaling.low_freq_factor", 1.0),
        high=stated.number("rope.scaling.high_freq_factor", 4.0),
        original_context_length=_original_context(stated),
    )
    if scaling.low >= scaling.high:
        raise CheckpointError("the model file is damaged: its low frequencies are not below its high ones")
    return replace(found, scaling=scaling)


def _yarn(stated: Stated, found: Rotary) -> Rotary:
    scaling = YarnScaling(
        factor=stated.number("rope.scaling.factor"),
        fast=stated.number("rope.scaling.yarn_beta_fast", 32.0),
        slow=stated.number("rope.scaling.yarn_beta_slow", 1.0),
        original_context_length=_original_context(stated),
    )
    magnitude = yarn_magnitude(scaling.factor) * stated.number("rope.scaling.attn_factor", 1.0)
    return replace(found, scaling=scaling, magnitude=magnitude)


_SCALINGS: Final = {"none": _unscaled, "linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _unscaled}
