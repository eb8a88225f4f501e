"""Granite 3: a Llama whose embeddings, residuals, attention and logits are scaled by stated numbers."""

from msgspec.structs import replace

from covey.engine.onnx.architecture import Architecture
from covey.engine.onnx.families.llama import plain
from covey.engine.onnx.stated import Stated


def granite(stated: Stated) -> Architecture:
    """Files that say that positions were not trained in mean that nothing is turned."""
    found = plain(stated, is_interleaved=True)
    if not stated.flag("rope.scaling.finetuned", default=True):
        found = replace(found, layers=tuple(replace(layer, rotary=None) for layer in found.layers))
    return replace(
        found,
        embedding_scale=stated.number("embedding_scale", 1.0),
        residual_scale=stated.number("residual_scale", 1.0),
        stated_attention_scale=stated.number("attention.scale", None),
        logit_divisor=stated.number("logit_scale"),
    )
