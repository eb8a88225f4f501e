"""What a graph has to know of a model: sizes, and where its family departs from the plain Llama.

Only nouns live here. `families` says how a file's metadata becomes one; `graph` what is computed for it.
"""

import math
from typing import Literal

from msgspec import Struct

Activation = Literal["silu", "gelu_tanh"]
HeadNorms = Literal["none", "heads", "rows"]


class Llama3Scaling(Struct, frozen=True):
    """Low frequencies are divided by `factor`, high ones kept, those between in between."""

    factor: float
    low: float  # wavelengths above `original_context_length / low` are divided
    high: float  # wavelengths below `original_context_length / high` are kept
    original_context_length: int


class YarnScaling(Struct, frozen=True):
    """YaRN, https://arxiv.org/abs/2309.00071: as above, with a ramp over the dimensions, and magnified."""

    factor: float
    fast: float  # turns within the original context above which a frequency is kept
    slow: float  # turns below which it is divided
    original_context_length: int
    is_truncated: bool = True  # the ramp begins and ends at whole dimensions


class LongFactors(Struct, frozen=True):
    """Divisors of each frequency: of contexts up to the original length, and of longer ones. None where none is."""

    short: tuple[float, ...] | str  # the divisors, or the tensor that holds them
    long: tuple[float, ...] | str
    original_context_length: int


class Rotary(Struct, frozen=True, kw_only=True):
    """How positions turn the values of a head. Layers that agree in it share one table."""

    size: int  # values of a head that are turned, from the first on
    base: float
    divisor: float = 1.0  # of positions
    scaling: Llama3Scaling | YarnScaling | None = None
    factors: LongFactors | str | None = None  # or the tensor that holds divisors for all contexts
    magnitude: float = 1.0  # of what is turned


class LayerArchitecture(Struct, frozen=True):
    window: int  # tokens that a token sees, itself included; 0 where it sees all before it
    rotary: Rotary | None  # None where positions turn nothing


class Experts(Struct, frozen=True, kw_only=True):
    """A feed-forward block of which each token uses a few of many, with shares that add up to 1."""

    count: int
    used_count: int
    is_clipped: bool = False  # gpt-oss: gate and up are clipped, and up counts from -1


class Architecture(Struct, frozen=True, kw_only=True):
    name: str
    hidden_size: int
    head_count: int
    kv_head_count: int
    head_size: int
    epsilon: float  # of the RMS norms
    layers: tuple[LayerArchitecture, ...]
    is_interleaved: bool = False  # neighbouring values are turned together, else those of the two halves
    norm_offset: float = 0.0  # added to the norms' weights
    has_pre_norms: bool = True  # before attention and feed-forward
    has_post_norms: bool = False  # after them, before their result is added to the residual
    feed_forward_norm: str = "ffn_norm"  # the tensor of the norm before feed-forward
    head_norms: HeadNorms = "none"  # of queries and keys, before they are turned: over each head, or all together
    has_sinks: bool = False  # heads may attend to nothing
    is_joined: bool = False  # query, key and value are one tensor, and so are gate and up
    activation: Activation = "silu"
    experts: Experts | None = None
    stated_attention_scale: float | None = None  # of query times key; None for 1 / sqrt(head size)
    attention_soft_cap: float = 0.0  # 0 for none
    logit_soft_cap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and feed-forward add
    logit_divisor: float = 1.0

    @property
    def layer_count(self) -> int:
        return len(self.layers)

    @property
    def attention_scale(self) -> float:
        stated = self.stated_attention_scale
        return 1 / math.sqrt(self.head_size) if stated is None else stated

    @property
    def query_size(self) -> int:
        return self.head_count * self.head_size

    @property
    def kv_size(self) -> int:
        return self.kv_head_count * self.head_size
