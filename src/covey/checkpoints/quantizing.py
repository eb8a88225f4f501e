"""Makes matrices in full precision small: rounds them to codes of 4 or 8 bits in blocks, and says what that costs.

The way is that of GGUF's Q4_0 and Q8_0 (ggml's `quantize_row_q4_0_ref`, `quantize_row_q8_0_ref`), but that scales stay
float32: nothing has to be written to a file.
"""

import math
from typing import Any, Final

import numpy as np
from msgspec.structs import replace

from covey.checkpoints.blocks import Blocks, Bytes, Floats, Form, PackedBlocks, pack_blocks, values_of
from covey.checkpoints.checkpoint import TensorEntry
from covey.checkpoints.quantization import dequantize, form_of, is_known
from covey.schema.model import Quantizing

BLOCK_SIZE: Final = 32
BITS: Final = {Quantizing.Q4: 4, Quantizing.Q8: 8}
PIECE_WEIGHTS: Final = 1 << 17  # that are floats at a time
ROUTER: Final = "ffn_gate_inp.weight"  # small, and if it were rounded, other experts would be chosen


def can_be_quantized(entry: TensorEntry) -> bool:
    """A matrix, or several, in full precision. A vector is small; its precision costs nothing."""
    is_matrix = len(entry.shape) > 1 and entry.shape[-1] % BLOCK_SIZE == 0
    is_weight = entry.name.endswith(".weight") and not entry.name.endswith(ROUTER)
    return is_matrix and is_weight and is_known(entry.type) and form_of(entry) is None


def quantized_bytes(entry: TensorEntry, bits: int, *, is_multiplied: bool = True) -> int:
    """What a runner holds of it, as `quantize_tensor` and a kernel make it; a table of embeddings is not multiplied."""
    form = Form(bits, BLOCK_SIZE, has_offsets=False)
    return form.byte_count(math.prod(entry.shape), is_multiplied=is_multiplied)


def quantized_spared_bytes(entry: TensorEntry, bits: int) -> int:
    """What exact mode holds less of it."""
    return Form(bits, BLOCK_SIZE, has_offsets=False).spared_bytes(math.prod(entry.shape))


def quantize_tensor(entry: TensorEntry, content: Bytes, bits: int) -> PackedBlocks:
    """One that `can_be_quantized`, piece by piece: with all of it as floats, loading would take several times what is
    held. `content`: its bytes in the file.
    """
    rows, columns = math.prod(entry.shape[:-1]), entry.shape[-1]
    codes = np.empty((rows, columns // BLOCK_SIZE, BLOCK_SIZE * bits // 8), np.uint8)
    scales = np.empty((rows, columns // BLOCK_SIZE), np.float32)
    step = max(PIECE_WEIGHTS // columns, 1)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        piece = replace(entry, shape=(part.stop - start, columns))
        packed = quantize(dequantize(piece, content.reshape(rows, -1)[part].reshape(-1)), bits)
        codes[part], scales[part] = packed.codes, packed.scales
    return PackedBlocks(bits, BLOCK_SIZE, codes, scales, None)


def quantize(weights: Floats, bits: int) -> PackedBlocks:
    """`weights`: [..., rows, columns], columns a multiple of 32; `bits`: 4 or 8."""
    return pack_blocks(rounded(weights, bits))


def rounded(weights: Floats, bits: int) -> Blocks:
    groups = weights.reshape(math.prod(weights.shape[:-1]), -1, BLOCK_SIZE)
    places = np.abs(groups).argmax(-1, keepdims=True)
    largest: Any = np.take_along_axis(groups, places, -1)
    # With 4 bits the largest weight becomes code 0, for there is one code more below the middle than above it.
    scales: Any = largest / np.float32(-8) if bits == 4 else np.abs(largest) / np.float32(127)  # noqa: PLR2004
    steps: Any = np.divide(groups, scales, out=np.zeros_like(groups), where=scales != 0)
    zero, top = 1 << (bits - 1), (1 << bits) - 1
    codes: Any = np.clip(np.rint(steps) + zero, 0, top)
    return Blocks(codes.astype(np.uint8), bits, zero, scales[..., 0].astype(np.float32), None)


def error_of(weights: Floats, bits: int) -> float:
    """The root of the mean square of what rounding changes, by that of the weights: 0 is exact, 1 is all lost."""
    changed = values_of(rounded(weights, bits)).reshape(weights.shape).astype(np.float64) - weights
    power = float(np.mean(np.square(weights, dtype=np.float64)))
    return math.sqrt(float(np.mean(np.square(changed))) / power) if power else 0.0
