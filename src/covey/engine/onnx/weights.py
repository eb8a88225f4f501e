"""Reads a stage's tensors from a GGUF file, and no others, into the forms that the graph takes."""

from typing import BinaryIO, Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from covey.checkpoints.gguf_file import CheckpointError, GgufHeader, read_tensor
from covey.checkpoints.quantization import (
    PackedBlocks,
    dequantize,
    is_blocked,
    is_known,
    known_types,
    pack,
    stays_in_table,
)
from covey.engine.contract import EngineError
from covey.engine.onnx.settings import LlamaSettings
from covey.schema.model import Shard

Floats = NDArray[np.float32]
Matrix = PackedBlocks | Floats  # [rows out, columns in]
Table = PackedBlocks | Floats | NDArray[np.float16]  # of token embeddings: [vocabulary, hidden]

EMBEDDING: Final = "token_embd.weight"
OUTPUT: Final = "output.weight"
OUTPUT_NORM: Final = "output_norm.weight"
ROPE_DIVISORS: Final = "rope_freqs.weight"
LAYER_TENSORS: Final = (
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down",
)  # fmt: skip


class LayerWeights(Struct, frozen=True):
    attention_norm: Floats
    query_key_value: tuple[Matrix, ...]  # one matrix where the three could be joined, else three
    attention_output: Matrix
    feed_forward_norm: Floats
    gate_up: tuple[Matrix, ...]  # one or two
    down: Matrix


class HeadWeights(Struct, frozen=True):
    norm: Floats
    output: Matrix

    @property
    def vocabulary_size(self) -> int:
        return row_count(self.output)


class StageFile:
    """The part of a model file that one stage is made of."""

    def __init__(self, file: BinaryIO, header: GgufHeader, settings: LlamaSettings, shard: Shard) -> None:
        """`file`: opened without a buffer, so that no byte is read twice. Raises `CheckpointError`, `EngineError`."""
        self._file = file
        self._header = header
        self._settings = settings
        self._shard = shard
        self.bytes_read = 0
        self.output_name = OUTPUT if OUTPUT in header.tensors else EMBEDDING  # many models tie the two
        self._check()

    @property
    def bytes_total(self) -> int:
        return sum(self._header.tensors[name].byte_count for name in self._needed())

    def read_layer(self, layer: int) -> LayerWeights:
        """Raises `CheckpointError`, `OSError`."""
        query, key, value = (self._matrix(f"blk.{layer}.attn_{name}.weight") for name in "qkv")
        return LayerWeights(
            attention_norm=self._floats(f"blk.{layer}.attn_norm.weight"),
            query_key_value=_join(query, key, value),
            attention_output=self._matrix(f"blk.{layer}.attn_output.weight"),
            feed_forward_norm=self._floats(f"blk.{layer}.ffn_norm.weight"),
            gate_up=_join(self._matrix(f"blk.{layer}.ffn_gate.weight"), self._matrix(f"blk.{layer}.ffn_up.weight")),
            down=self._matrix(f"blk.{layer}.ffn_down.weight"),
        )

    def read_rope_divisors(self) -> Floats | None:
        return self._floats(ROPE_DIVISORS) if ROPE_DIVISORS in self._header.tensors else None

    def read_ends(self) -> tuple[Table | None, HeadWeights | None]:
        """What the first and the last stage have beside layers; a tied embedding is read once for both."""
        table = self._table() if self._is_first else None
        if not self._is_last:
            return table, None
        norm = self._floats(OUTPUT_NORM)
        if table is None or self.output_name == OUTPUT:
            return table, HeadWeights(norm, self._matrix(self.output_name))
        output = table if isinstance(table, PackedBlocks) else table.astype(np.float32, copy=False)
        return table, HeadWeights(norm, output)

    @property
    def _is_first(self) -> bool:
        return self._shard.layer_start == 0

    @property
    def _is_last(self) -> bool:
        return self._shard.layer_end == self._shard.layer_count

    def _needed(self) -> list[str]:
        layers = range(self._shard.layer_start, self._shard.layer_end)
        names = [f"blk.{layer}.{tensor}.weight" for layer in layers for tensor in LAYER_TENSORS]
        if ROPE_DIVISORS in self._header.tensors:
            names.append(ROPE_DIVISORS)
        if self._is_first:
            names.append(EMBEDDING)
        if self._is_last:
            names.append(OUTPUT_NORM)
            if not (self._is_first and self.output_name == EMBEDDING):
                names.append(self.output_name)
        return names

    def _check(self) -> None:
        """Everything that can be refused before a byte of weights is read."""
        shapes = _layer_shapes(self._settings)
        for name in self._needed():
            entry = self._header.tensors.get(name)
            if entry is None:
                raise CheckpointError(f"the model file lacks its tensor {name!r}; it may be of an unknown kind")
            if not is_known(entry.type):
                known = ", ".join(known_types())
                raise EngineError(f"tensor {name!r} has the type {entry.type}, which can't be run; known are {known}")
            expected = shapes.get(name.split(".", 2)[-1])
            if expected is not None and not _fits(entry.shape, expected):
                raise CheckpointError(f"the model file is damaged: tensor {name!r} measures {entry.shape}")
        self._refuse_unknown_tensors()

    def _refuse_unknown_tensors(self) -> None:
        """A layer with a tensor that the graph would leave out would compute something else, and nobody would see."""
        for name in self._header.tensors:
            if name.startswith("blk.") and name.split(".", 2)[-1] not in _LAYER_NAMES:
                raise EngineError(f"this model's layers have a tensor {name!r}, which this engine does not know")

    def _read(self, name: str) -> NDArray[np.uint8]:
        entry = self._header.tensors[name]
        self.bytes_read += entry.byte_count
        return read_tensor(self._file, entry)

    def _floats(self, name: str) -> Floats:
        return dequantize(self._header.tensors[name], self._read(name))

    def _matrix(self, name: str) -> Matrix:
        entry = self._header.tensors[name]
        content = self._read(name)
        return pack(entry, content) if is_blocked(entry.type) else dequantize(entry, content)

    def _table(self) -> Table:
        entry = self._header.tensors[EMBEDDING]
        if stays_in_table(entry.type):
            return self._read(EMBEDDING).view("<f2").reshape(entry.shape)
        return self._matrix(EMBEDDING)


def row_count(matrix: Table) -> int:
    return (matrix.scales if isinstance(matrix, PackedBlocks) else matrix).shape[0]


_LAYER_NAMES: Final = frozenset(f"{tensor}.weight" for tensor in LAYER_TENSORS)


def _layer_shapes(settings: LlamaSettings) -> dict[str, tuple[int | None, ...]]:
    """What each tensor has to measure; None where the file alone says it."""
    hidden, query, key_value = settings.hidden_size, settings.query_size, settings.kv_size
    return {
        "attn_norm.weight": (hidden,),
        "attn_q.weight": (query, hidden),
        "attn_k.weight": (key_value, hidden),
        "attn_v.weight": (key_value, hidden),
        "attn_output.weight": (hidden, query),
        "ffn_norm.weight": (hidden,),
        "ffn_gate.weight": (None, hidden),
        "ffn_up.weight": (None, hidden),
        "ffn_down.weight": (hidden, None),
        OUTPUT_NORM: (hidden,),
        OUTPUT: (None, hidden),
        EMBEDDING: (None, hidden),
        ROPE_DIVISORS: (settings.head_size // 2,),
    }


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(e in (None, s) for s, e in zip(shape, expected, strict=True))


def _join(*matrices: Matrix) -> tuple[Matrix, ...]:
    """Matrices of one input below one another, as one, where their forms allow it: one kernel call, not three."""
    if all(isinstance(matrix, np.ndarray) for matrix in matrices):
        return (np.concatenate([matrix for matrix in matrices if isinstance(matrix, np.ndarray)]),)
    packed = [matrix for matrix in matrices if isinstance(matrix, PackedBlocks)]
    if len(packed) < len(matrices) or len({_form(matrix) for matrix in packed}) > 1:
        return matrices
    offsets = [matrix.offsets for matrix in packed if matrix.offsets is not None]
    return (
        PackedBlocks(
            packed[0].bits,
            packed[0].block_size,
            np.concatenate([matrix.codes for matrix in packed]),
            np.concatenate([matrix.scales for matrix in packed]),
            np.concatenate(offsets) if offsets else None,
        ),
    )


def _form(matrix: PackedBlocks) -> tuple[int, int, bool]:
    return matrix.bits, matrix.block_size, matrix.offsets is None
