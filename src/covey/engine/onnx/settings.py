"""What a Llama checkpoint's metadata says about its shape, as the graph needs it.

The names are those of the GGUF specification; files that ask for something this graph can't do are refused here.
"""

from typing import Any, Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from covey.checkpoints.gguf_file import CheckpointError, GgufHeader
from covey.engine.contract import EngineError

ARCHITECTURE: Final = "llama"
ROPE_SCALINGS: Final = ("none", "linear")


class LlamaSettings(Struct, frozen=True, kw_only=True):
    layer_count: int
    hidden_size: int
    head_count: int
    kv_head_count: int
    head_size: int
    epsilon: float  # of the RMS norms
    rope_base: float
    rope_divisor: float  # of positions; 1.0 unless the file scales them linearly

    @property
    def query_size(self) -> int:
        return self.head_count * self.head_size

    @property
    def kv_size(self) -> int:
        return self.kv_head_count * self.head_size


def read_settings(header: GgufHeader) -> LlamaSettings:
    """Raises `EngineError` for what this engine can't run, `CheckpointError` for what is missing."""
    architecture = header.metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise EngineError(f"this model is of the architecture {architecture!r}; this engine knows {ARCHITECTURE!r}")
    if header.metadata.get("llama.expert_count", 0):
        raise EngineError("this model is a mixture of experts, which this engine does not know; it knows dense models")
    hidden_size = _number(header, "llama.embedding_length", int)
    head_count = _number(header, "llama.attention.head_count", int)
    rope_size = _number(header, "llama.rope.dimension_count", int, hidden_size // head_count)
    settings = LlamaSettings(
        layer_count=_number(header, "llama.block_count", int),
        hidden_size=hidden_size,
        head_count=head_count,
        kv_head_count=_number(header, "llama.attention.head_count_kv", int, head_count),
        head_size=_number(header, "llama.attention.key_length", int, rope_size),
        epsilon=_number(header, "llama.attention.layer_norm_rms_epsilon", float),
        rope_base=_number(header, "llama.rope.freq_base", float, 10000.0),
        rope_divisor=_rope_divisor(header),
    )
    if settings.head_size != rope_size:
        raise EngineError(
            f"this model rotates {rope_size} of {settings.head_size} values of a head; only all are known"
        )
    return settings


def rotary_tables(
    settings: LlamaSettings, context_length: int, divisors: NDArray[np.float32] | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines, [positions, head size / 2] each; `divisors` of the frequencies come with Llama 3."""
    exponents = np.arange(0, settings.head_size, 2, dtype=np.float64) / settings.head_size
    frequencies = settings.rope_base**-exponents
    if divisors is not None:
        frequencies /= divisors.astype(np.float64)
    positions = np.arange(context_length, dtype=np.float64) / settings.rope_divisor
    angles = np.outer(positions, frequencies)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _number(header: GgufHeader, key: str, kind: type[Any], default: Any = None) -> Any:
    value: Any = header.metadata.get(key, default)
    repeated: list[Any] = value if isinstance(value, list) else [value]  # some files state it for each layer
    value = repeated[0] if repeated and repeated.count(repeated[0]) == len(repeated) else None
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or value <= 0:
        raise CheckpointError(f"the model file is damaged: its metadata gives {key} as {value!r}")
    return value


def _rope_divisor(header: GgufHeader) -> float:
    scaling = header.metadata.get("llama.rope.scaling.type", "none")
    if scaling not in ROPE_SCALINGS:
        raise EngineError(f"this model scales its positions by {scaling!r}; known are {', '.join(ROPE_SCALINGS)}")
    if scaling == "none":
        return 1.0
    return _number(header, "llama.rope.scaling.factor", float, header.metadata.get("llama.rope.scale_linear"))
