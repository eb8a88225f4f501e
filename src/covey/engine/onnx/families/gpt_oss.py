"""gpt-oss: experts with a clipped activation, heads that may attend to nothing, and a window on every other layer."""

from typing import Final

from msgspec.structs import replace

from covey.engine.contract import EngineError
from covey.engine.onnx.architecture import Architecture, LayerArchitecture, YarnScaling
from covey.engine.onnx.families.llama import experts, plain, windows
from covey.engine.onnx.stated import Stated

PERIOD: Final = 2


def gpt_oss(stated: Stated) -> Architecture:
    """Its YaRN ramp begins and ends between dimensions, which GGUF has no key for."""
    mixture = experts(stated, is_clipped=True)
    if mixture is None:
        raise EngineError("this gpt-oss model has no experts; only those with experts are known")
    found = plain(stated, experts=mixture, has_sinks=True, feed_forward_norm="post_attention_norm")

    def layer(index: int, window: int) -> LayerArchitecture:
        rotary = found.layers[index].rotary
        if rotary is not None and isinstance(rotary.scaling, YarnScaling):
            rotary = replace(rotary, scaling=replace(rotary.scaling, is_truncated=False))
        return LayerArchitecture(window, rotary)

    seen = windows(stated, period=PERIOD)
    return replace(found, layers=tuple(layer(index, window) for index, window in enumerate(seen)))
