"""From a `config.json`, as Hugging Face's transformers write it, to metadata in the words of GGUF.

What the keys mean is what transformers' model classes do with them; which GGUF key says the same, what llama.cpp's
`convert_hf_to_gguf.py` writes. GGUF files have the values of some of these in their tensors, which are kept apart here:
`tensors` gives what a config says and a GGUF file holds as a tensor.
"""

import math
from typing import Any, Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from covey.checkpoints.checkpoint import CheckpointError
from covey.checkpoints.hub_families import FAMILIES, Family

Config = dict[str, Any]

LAYERS_MAX: Final = 10_000
COUNT_MAX: Final = 1 << 40

# GGUF's key behind the architecture, and what a config calls it; the first that is there counts.
_COUNTS: Final = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "vocab_size": "vocab_size",
}
_OPTIONAL_COUNTS: Final = (
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.key_length", "head_dim"),
    ("attention.value_length", "head_dim"),
    ("expert_count", "num_local_experts"),
    ("expert_count", "num_experts"),
    ("expert_used_count", "num_experts_per_tok"),
    ("expert_feed_forward_length", "moe_intermediate_size"),
)
_OPTIONAL_NUMBERS: Final = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base_swa": "rope_local_base_freq",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention.scale": "attention_multiplier",
    "logit_scale": "logits_scaling",
}
_ORIGINAL_LENGTHS: Final = ("original_max_position_embeddings", "max_position_embeddings")
_SCALINGS: Final = ("default", "linear", "llama3", "longrope", "yarn")


class Translated(Struct, frozen=True):
    metadata: dict[str, Any]
    tensors: dict[str, NDArray[np.float32]]


def family_of(config: Config) -> Family:
    """Raises `CheckpointError` that names what is known."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        stated = "states no model_type" if kind is None else f"is of the model_type {kind!r}"
        raise CheckpointError(f"its config.json {stated}; known are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind]


def text_config(config: Config) -> Config:
    """Models that also see pictures keep what they know about text in a config of its own."""
    inner = config.get("text_config")
    return config | inner if isinstance(inner, dict) else config


def translate(config: Config, family: Family) -> Translated:
    """Raises `CheckpointError` that names the key that is missing, absurd or asks for what is not known."""
    _expect_activation(config, family)
    config = family.defaults | config
    for key in family.needed:
        number(config, key)
    own = _numbers(config) | _windows(config, family) | _experts(config, family)
    rope, tensors = _rope(config, family)
    metadata: dict[str, Any] = {f"{family.architecture}.{key}": value for key, value in (own | rope).items()}
    metadata |= {"general.architecture": family.architecture, "covey.rotary_interleaved": False}
    if family.norm_offset:
        metadata["covey.norm_offset"] = family.norm_offset
    if family.rotates_some_layers:
        metadata["covey.rotary_layers"] = _rotated_layers(config, _layer_count(config))
    return Translated(metadata, tensors)


def number(config: Config, key: str, default: Any = None) -> Any:
    """A finite number above 0."""
    value = config.get(key, default)
    if value is None:
        raise CheckpointError(f"its config.json lacks {key!r}, a number above 0")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise CheckpointError(f"its config.json gives {key!r} as {value!r}, not as a number above 0")
    return value


def count(config: Config, key: str, most: int = COUNT_MAX) -> int:
    """A whole number above 0."""
    value = number(config, key)
    if not isinstance(value, int) or value > most:
        raise CheckpointError(f"its config.json gives {key!r} as {value!r}, not as a whole number up to {most}")
    return value


def _numbers(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = {key: count(config, name) for key, name in _COUNTS.items()}
    found |= {key: count(config, name) for key, name in _OPTIONAL_COUNTS if config.get(name) is not None}
    found["attention.layer_norm_rms_epsilon"] = number(config, "rms_norm_eps")
    found |= {key: number(config, name) for key, name in _OPTIONAL_NUMBERS.items() if config.get(name) is not None}
    if config.get("query_pre_attn_scalar") is not None:
        found["attention.scale"] = number(config, "query_pre_attn_scalar") ** -0.5
    return found


def _layer_count(config: Config) -> int:
    return count(config, "num_hidden_layers", LAYERS_MAX)


def _expect_activation(config: Config, family: Family) -> None:
    stated = config.get("hidden_activation") or config.get("hidden_act") or family.activations[0]
    if stated not in family.activations:
        known = " or ".join(family.activations)
        raise CheckpointError(f"its config.json states the activation {stated!r}, where this family has {known}")


def _windows(config: Config, family: Family) -> dict[str, Any]:
    """Which layers see only a window of the text; a list of a value for each layer."""
    is_used = config.get("use_sliding_window", not family.window_is_asked_for)
    if config.get("sliding_window") is None or not is_used:
        return {}
    return {
        "attention.sliding_window": count(config, "sliding_window"),
        "attention.sliding_window_pattern": _sliding_layers(config, family, _layer_count(config)),
    }


def _sliding_layers(config: Config, family: Family, layers: int) -> list[bool]:
    kinds = config.get("layer_types")
    if kinds is not None:
        return [kind == "sliding_attention" for kind in _of_each_layer(kinds, "layer_types", layers)]
    if config.get("max_window_layers") is not None:
        return [layer >= number(config, "max_window_layers") for layer in range(layers)]
    stated = config.get("sliding_window_pattern") is not None
    period = count(config, "sliding_window_pattern") if stated else family.full_attention_every
    return [(layer + 1) % period != 0 if period else True for layer in range(layers)]


def _rotated_layers(config: Config, layers: int) -> list[bool]:
    """SmolLM3's `no_rope_layers` has, against its name, 1 for the layers that do rotate."""
    stated = config.get("no_rope_layers")
    if stated is not None:
        return [bool(each) for each in _of_each_layer(stated, "no_rope_layers", layers)]
    interval = count({"no_rope_layer_interval": 4} | config, "no_rope_layer_interval")
    return [(layer + 1) % interval != 0 for layer in range(layers)]


def _of_each_layer(values: Any, key: str, layers: int) -> list[Any]:
    if not isinstance(values, list) or len(values) != layers:
        raise CheckpointError(f"its config.json has a {key!r} that is not one value for each of its {layers} layers")
    return values


def _experts(config: Config, family: Family) -> dict[str, Any]:
    """`family.experts_norm`: the key that says whether the chosen experts' weights are made to add up to 1."""
    found: dict[str, Any] = {}
    if family.experts_norm:
        found["expert_weights_norm"] = config.get(family.experts_norm, False) is True
    if family.architecture == "gpt-oss":
        found["expert_feed_forward_length"] = count(config, "intermediate_size")
    return found


def _rope(config: Config, family: Family) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """Newer configs have `rope_parameters`, which older ones spread over `rope_theta` and `rope_scaling`."""
    scaling = _section(config, "rope_parameters") or _section(config, "rope_scaling")
    found: dict[str, Any] = {}
    if "full_attention" in scaling:  # one for each kind of layer
        sliding, scaling = _section(scaling, "sliding_attention"), _section(scaling, "full_attention")
        found |= {"rope.freq_base_swa": number(sliding, "rope_theta")} if sliding else {}
    found["rope.freq_base"] = number(scaling if "rope_theta" in scaling else config, "rope_theta", family.rope_base)
    size = int(_head_size(config) * number(scaling | config, "partial_rotary_factor", 1.0))
    found["rope.dimension_count"] = size
    scaled, tensors = _scaled(scaling, config, found["rope.freq_base"], size)
    return found | scaled, tensors


def _section(config: Config, key: str) -> Config:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"its config.json has something under {key!r} that is no object")
    return value


def _head_size(config: Config) -> int:
    if config.get("head_dim") is not None:
        return count(config, "head_dim")
    return count(config, "hidden_size") // count(config, "num_attention_heads")


def _scaled(
    scaling: Config, config: Config, base: float, size: int
) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    match scaling.get("rope_type", scaling.get("type", "default")):
        case "default":
            return {}, {}
        case "linear":
            return {"rope.scaling.type": "linear", "rope.scaling.factor": float(number(scaling, "factor"))}, {}
        case "llama3":
            return {}, {"rope_freqs.weight": llama3_divisors(scaling, base, size)}
        case "longrope":
            return _longrope(scaling, config, size)
        case "yarn":
            return _yarn(scaling, config), {}
        case kind:
            known = ", ".join(_SCALINGS)
            raise CheckpointError(f"its config.json scales positions by {kind!r}; known are {known}")


def llama3_divisors(scaling: Config, base: float, size: int) -> NDArray[np.float32]:
    """What each frequency is divided by, as in transformers' `_compute_llama3_parameters`: [size / 2].

    Waves that fit the original context often stay, those that hardly fit are stretched, and between the two it glides.
    """
    factor, low, high = (number(scaling, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = count(scaling, "original_max_position_embeddings")
    if high <= low:
        raise CheckpointError(f"its config.json gives 'high_freq_factor' as {high}, not above its low one of {low}")
    wavelengths = 2 * np.pi * base ** (np.arange(0, size, 2, dtype=np.float64) / size)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _longrope(scaling: Config, config: Config, size: int) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    original = count(scaling | config, "original_max_position_embeddings")
    ratio = number(config, "max_position_embeddings") / original
    attention = 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(original))
    if scaling.get("attention_factor") is not None:
        attention = number(scaling, "attention_factor")
    metadata = {
        "rope.scaling.type": "longrope",
        "rope.scaling.attn_factor": attention,
        "rope.scaling.original_context_length": original,
    }
    return metadata, {f"rope_factors_{each}.weight": _factors(scaling, each, size) for each in ("long", "short")}


def _factors(scaling: Config, which: str, size: int) -> NDArray[np.float32]:
    values = scaling.get(f"{which}_factor")
    if not isinstance(values, list) or len(values) != size // 2:
        raise CheckpointError(f"its config.json needs {size // 2} numbers as the {which}_factor of its positions")
    return np.array([number({"it": value}, "it") for value in values], np.float32)


def _yarn(scaling: Config, config: Config) -> dict[str, Any]:
    known = scaling if scaling.get("original_max_position_embeddings") is not None else config
    original = count(known, next(key for key in _ORIGINAL_LENGTHS if key in known))
    found: dict[str, Any] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(number(scaling, "factor")),
        "rope.scaling.original_context_length": original,
        "rope.scaling.yarn_beta_fast": float(number(scaling, "beta_fast", 32.0)),
        "rope.scaling.yarn_beta_slow": float(number(scaling, "beta_slow", 1.0)),
    }
    if scaling.get("attention_factor") is not None:
        found["rope.scaling.attn_factor"] = float(number(scaling, "attention_factor"))
    return found
