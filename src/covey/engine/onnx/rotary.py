"""Tables of the cosines and sines by which positions turn queries and keys."""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from covey.engine.onnx.architecture import Llama3Scaling, LongFactors, Rotary, YarnScaling

Doubles = NDArray[np.float64]
FloatType = type[np.float32] | type[np.float16]
Tables = tuple[NDArray[np.floating], NDArray[np.floating]]


def factors_for(rotary: Rotary, context_length: int) -> tuple[float, ...] | str | None:
    """The divisors of frequencies that hold in this context, or the name of the tensor that has them."""
    if not isinstance(rotary.factors, LongFactors):
        return rotary.factors
    is_long = context_length > rotary.factors.original_context_length
    return rotary.factors.long if is_long else rotary.factors.short


@lru_cache(maxsize=4)
def rotary_tables(
    rotary: Rotary, context_length: int, factors: tuple[float, ...] | None, dtype: FloatType = np.float32
) -> Tables:
    """Cosines and sines, [positions, turned values / 2] each; `factors` divide the frequencies.

    All graphs of a stage share them: they are large where the context is long, and a mixture has many graphs.
    """
    exponents = np.arange(0, rotary.size, 2, dtype=np.float64) / rotary.size
    frequencies = rotary.base**-exponents
    if factors is not None:
        frequencies /= np.asarray(factors, np.float64)
    if isinstance(rotary.scaling, Llama3Scaling):
        frequencies = _llama3(frequencies, rotary.scaling)
    elif isinstance(rotary.scaling, YarnScaling):
        frequencies = _yarn(frequencies, rotary.base, rotary.scaling)
    positions = np.arange(context_length, dtype=np.float64) / rotary.divisor
    angles = np.outer(positions, frequencies)
    cosines, sines = rotary.magnitude * np.cos(angles), rotary.magnitude * np.sin(angles)
    return cosines.astype(dtype), sines.astype(dtype)


def yarn_magnitude(factor: float) -> float:
    return 1.0 + 0.1 * math.log(factor) if factor > 1.0 else 1.0


def long_magnitude(context_length: int, original_context_length: int) -> float:
    """LongRoPE, https://arxiv.org/abs/2402.13753: what a model that was stretched so far is magnified by."""
    stretch = context_length / original_context_length
    return math.sqrt(1 + math.log(stretch) / math.log(original_context_length)) if stretch > 1.0 else 1.0


def _llama3(frequencies: Doubles, scaling: Llama3Scaling) -> Doubles:
    """The formula is that of Llama 3.1's reference code, `apply_scaling`."""
    turns = scaling.original_context_length * frequencies / (2 * math.pi)
    kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def _yarn(frequencies: Doubles, base: float, scaling: YarnScaling) -> Doubles:
    """Section 3.2 of the paper ("NTK-by-parts"), with the ramp over dimensions that its reference code uses."""
    count = len(frequencies)

    def dimension(turns: float) -> float:
        return count * math.log(scaling.original_context_length / (turns * 2 * math.pi)) / math.log(base)

    first, last = dimension(scaling.fast), dimension(scaling.slow)
    if scaling.is_truncated:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0.0), min(last, 2 * count - 1.0)
    divided = np.clip((np.arange(count) - first) / max(last - first, 0.001), 0.0, 1.0)
    return divided * frequencies / scaling.factor + (1 - divided) * frequencies
