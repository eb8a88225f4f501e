"""Gemma 2 and 3: norms before and after, scaled embeddings, and windows on most layers; Gemma 2 has soft caps."""

import math
from typing import Final

from msgspec.structs import replace

from covey.engine.onnx.architecture import Architecture, LayerArchitecture
from covey.engine.onnx.families.llama import plain, windows
from covey.engine.onnx.stated import Stated

GEMMA2_PERIOD: Final = 2
GEMMA2_WINDOW: Final = 4096
GEMMA2_SOFT_CAPS: Final = (50.0, 30.0)  # of attention and of logits
GEMMA2_LAYERS_LARGEST: Final = 46  # of the 27 B model, whose attention is scaled by another rule
GEMMA3_PERIOD: Final = 6
GEMMA3_WINDOWED_BASE: Final = 10000.0
GEMMA3_LAYERS_LARGEST: Final = 62


def gemma2(stated: Stated) -> Architecture:
    found = _gemma(stated, GEMMA2_LAYERS_LARGEST)
    seen = windows(stated, period=GEMMA2_PERIOD, default=GEMMA2_WINDOW)
    return replace(
        found,
        layers=tuple(replace(layer, window=window) for layer, window in zip(found.layers, seen, strict=True)),
        attention_soft_cap=stated.number("attn_logit_softcapping", GEMMA2_SOFT_CAPS[0]),
        logit_soft_cap=stated.number("final_logit_softcapping", GEMMA2_SOFT_CAPS[1]),
    )


def gemma3(stated: Stated) -> Architecture:
    """Layers with a window have a base of their own, and their positions are never scaled."""
    found = _gemma(stated, GEMMA3_LAYERS_LARGEST)
    base = stated.number("rope.freq_base_swa", GEMMA3_WINDOWED_BASE)

    def layer(index: int, window: int) -> LayerArchitecture:
        rotary = found.layers[index].rotary
        if window and rotary is not None:
            rotary = replace(rotary, base=base, divisor=1.0, scaling=None, factors=None, magnitude=1.0)
        return LayerArchitecture(window, rotary)

    return replace(
        found,
        layers=tuple(layer(index, window) for index, window in enumerate(windows(stated, period=GEMMA3_PERIOD))),
        head_norms="heads",
        logit_soft_cap=stated.number("final_logit_softcapping", None) or 0.0,
    )


def _gemma(stated: Stated, layers_largest: int) -> Architecture:
    found = plain(stated, has_post_norms=True, activation="gelu_tanh")
    scaled_size = found.hidden_size // found.head_count if found.layer_count == layers_largest else found.head_size
    return replace(
        found,
        embedding_scale=math.sqrt(found.hidden_size),
        stated_attention_scale=stated.number("attention.scale", 1 / math.sqrt(scaled_size)),
    )
