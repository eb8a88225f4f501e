"""From a checkpoint's metadata to the architecture that the graph builder takes.

The names are those of the GGUF specification; files that ask for something the graph can't do are refused here.
"""

from collections.abc import Callable
from typing import Final

from covey.checkpoints.checkpoint import Checkpoint
from covey.engine.contract import EngineError
from covey.engine.onnx.architecture import Architecture
from covey.engine.onnx.families.gemma import gemma2, gemma3
from covey.engine.onnx.families.gpt_oss import gpt_oss
from covey.engine.onnx.families.granite import granite
from covey.engine.onnx.families.llama import llama, smollm3
from covey.engine.onnx.families.olmo import olmo2
from covey.engine.onnx.families.phi import phi3
from covey.engine.onnx.families.qwen import qwen2, qwen3, qwen3moe
from covey.engine.onnx.stated import Stated

FAMILIES: Final[dict[str, Callable[[Stated], Architecture]]] = {
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gpt-oss": gpt_oss,
    "granite": granite,
    "llama": llama,
    "olmo2": olmo2,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3moe": qwen3moe,
    "smollm3": smollm3,
}


def read_settings(header: Checkpoint) -> Architecture:
    """Raises `EngineError` for what this engine can't run, `CheckpointError` for what is missing."""
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in FAMILIES:
        raise EngineError(f"this model is of the architecture {name!r}; this engine knows {', '.join(FAMILIES)}")
    return FAMILIES[name](Stated(header, name))
