"""OLMo 2: norms only after attention and feed-forward, and over whole queries and keys. OLMo 3 adds windows.

Both carry the name of the former in GGUF files.
"""

from typing import Final

from msgspec.structs import replace

from covey.engine.onnx.architecture import Architecture, LayerArchitecture
from covey.engine.onnx.families.llama import plain, windows
from covey.engine.onnx.stated import Stated

OLMO3_PERIOD: Final = 4


def olmo2(stated: Stated) -> Architecture:
    """Positions of layers with a window are not scaled."""
    found = plain(stated, has_pre_norms=False, has_post_norms=True, head_norms="rows")

    def layer(index: int, window: int) -> LayerArchitecture:
        rotary = found.layers[index].rotary
        if window and rotary is not None:
            rotary = replace(rotary, divisor=1.0, scaling=None, magnitude=1.0)
        return LayerArchitecture(window, rotary)

    seen = windows(stated, period=OLMO3_PERIOD)
    return replace(found, layers=tuple(layer(index, window) for index, window in enumerate(seen)))
