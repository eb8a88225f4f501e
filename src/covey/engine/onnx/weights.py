"""Reads a stage's tensors from a model's files, and no others, into the forms that the graph takes."""

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from covey.checkpoints.checkpoint import EMBEDDING, OUTPUT, Checkpoint, TensorReader
from covey.checkpoints.quantization import PackedBlocks, dequantize, is_blocked, pack, stays_in_table
from covey.checkpoints.quantizing import can_be_quantized, quantize_tensor
from covey.engine.onnx import tensors
from covey.engine.onnx.architecture import Architecture, Rotary
from covey.engine.onnx.rotary import Tables, factors_for, rotary_tables
from covey.engine.onnx.tensors import OUTPUT_NORM
from covey.schema.model import Shard

Floats = NDArray[np.float32]
Matrix = PackedBlocks | Floats  # [rows out, columns in]
Table = PackedBlocks | Floats | NDArray[np.float16]  # of token embeddings: [vocabulary, hidden]


class Linear(Struct, frozen=True):
    matrix: Matrix
    bias: Floats | None = None  # [rows out]


class FeedForwardWeights(Struct, frozen=True):
    gate_up: tuple[Linear, ...]  # one or two
    down: Linear


class ExpertsWeights(Struct, frozen=True):
    router: Linear
    experts: tuple[FeedForwardWeights, ...]


class LayerWeights(Struct, frozen=True, kw_only=True):
    """Norms, sinks and what else a family does without are None."""

    attention_norm: Floats | None
    query_key_value: tuple[Linear, ...]  # one where the three could be joined, else three
    query_norm: Floats | None
    key_norm: Floats | None
    sinks: Floats | None  # [heads]
    attention_output: Linear
    attention_post_norm: Floats | None
    feed_forward_norm: Floats | None
    feed_forward: FeedForwardWeights | ExpertsWeights
    feed_forward_post_norm: Floats | None


class HeadWeights(Struct, frozen=True):
    norm: Floats
    output: Matrix

    @property
    def vocabulary_size(self) -> int:
        return row_count(self.output)


class StageFile:
    """The part of a model file that one stage is made of."""

    def __init__(
        self,
        reader: TensorReader,
        header: Checkpoint,
        architecture: Architecture,
        shard: Shard,
        context_length: int,
        bits: int | None = None,
    ) -> None:
        """`bits`: what matrices in full precision are rounded to; None: they stay. Raises `CheckpointError`,
        `EngineError`.
        """
        self._reader = reader
        self._header = header
        self._architecture = architecture
        self._shard = shard
        self._context_length = context_length
        self._bits = bits
        self._needed = tensors.needed(header, architecture, shard, context_length)
        self._in_layers = tensors.layer_shapes(architecture)
        self.bytes_read = 0
        tensors.check(header, architecture, self._needed)

    @property
    def bytes_total(self) -> int:
        return sum(self._header.tensors[name].byte_count for name in self._needed)

    def read_layer(self, layer: int) -> LayerWeights:
        """Raises `CheckpointError`, `OSError`."""
        architecture = self._architecture
        post_norm = "post_attention_norm" if architecture.has_post_norms else ""
        return LayerWeights(
            attention_norm=self._norm(layer, "attn_norm"),
            query_key_value=self._query_key_value(layer),
            query_norm=self._norm(layer, "attn_q_norm"),
            key_norm=self._norm(layer, "attn_k_norm"),
            sinks=self._optional(layer, "attn_sinks"),
            attention_output=self._linear(layer, "attn_output"),
            attention_post_norm=self._norm(layer, post_norm),
            feed_forward_norm=self._norm(layer, architecture.feed_forward_norm),
            feed_forward=self._feed_forward(layer),
            feed_forward_post_norm=self._norm(layer, "post_ffw_norm"),
        )

    def read_rotary_tables(self) -> dict[Rotary, Tables]:
        """For every way of turning that the stage's layers have."""
        layers = self._architecture.layers[self._shard.layer_start : self._shard.layer_end]
        rotaries = list(dict.fromkeys(layer.rotary for layer in layers if layer.rotary is not None))
        named = {
            name: tuple(self._floats(name).tolist()) for name in tensors.factor_tensors(rotaries, self._context_length)
        }
        tables: dict[Rotary, Tables] = {}
        for rotary in rotaries:
            factors = factors_for(rotary, self._context_length)
            factors = named[factors] if isinstance(factors, str) else factors
            tables[rotary] = rotary_tables(rotary, self._context_length, factors)
        return tables

    def read_ends(self) -> tuple[Table | None, HeadWeights | None]:
        """What the first and the last stage have beside layers; a tied embedding is read once for both."""
        table = self._table() if self._shard.layer_start == 0 else None
        if self._shard.layer_end != self._shard.layer_count:
            return table, None
        norm = self._floats(OUTPUT_NORM) + np.float32(self._architecture.norm_offset)
        name = tensors.output_name(self._header)
        if table is None or name == OUTPUT:
            return table, HeadWeights(norm, self._matrix(name))
        output = table if isinstance(table, PackedBlocks) else table.astype(np.float32, copy=False)
        return table, HeadWeights(norm, output)

    def _query_key_value(self, layer: int) -> tuple[Linear, ...]:
        if self._architecture.is_joined:
            return (self._linear(layer, "attn_qkv"),)
        return _join(*(self._linear(layer, f"attn_{name}") for name in "qkv"))

    def _feed_forward(self, layer: int) -> FeedForwardWeights | ExpertsWeights:
        if self._architecture.experts is not None:
            gates, ups, downs = (self._experts(layer, f"ffn_{name}_exps") for name in ("gate", "up", "down"))
            each = zip(gates, ups, downs, strict=True)
            experts = tuple(FeedForwardWeights(_join(gate, up), down) for gate, up, down in each)
            return ExpertsWeights(self._linear(layer, "ffn_gate_inp"), experts)
        if self._architecture.is_joined:
            return FeedForwardWeights((self._linear(layer, "ffn_up"),), self._linear(layer, "ffn_down"))
        gate_up = _join(self._linear(layer, "ffn_gate"), self._linear(layer, "ffn_up"))
        return FeedForwardWeights(gate_up, self._linear(layer, "ffn_down"))

    def _linear(self, layer: int, name: str) -> Linear:
        bias = f"blk.{layer}.{name}.bias"
        return Linear(
            self._matrix(f"blk.{layer}.{name}.weight"), self._floats(bias) if bias in self._header.tensors else None
        )

    def _experts(self, layer: int, name: str) -> list[Linear]:
        """One for each; their matrices are parts of one tensor."""
        shape = self._header.tensors[f"blk.{layer}.{name}.weight"].shape
        together = self._linear(layer, name)
        return [_part(together, index, shape) for index in range(shape[0])]

    def _norm(self, layer: int, name: str) -> Floats | None:
        found = self._optional(layer, name)
        return None if found is None else found + np.float32(self._architecture.norm_offset)

    def _optional(self, layer: int, name: str) -> Floats | None:
        is_there = f"{name}.weight" in self._in_layers
        return self._floats(f"blk.{layer}.{name}.weight") if is_there else None

    def _read(self, name: str) -> NDArray[np.uint8]:
        entry = self._header.tensors[name]
        self.bytes_read += entry.byte_count
        return self._reader.read(entry)

    def _floats(self, name: str) -> Floats:
        return dequantize(self._header.tensors[name], self._read(name))

    def _matrix(self, name: str) -> Matrix:
        entry = self._header.tensors[name]
        content = self._read(name)
        if self._bits is not None and can_be_quantized(entry):
            return quantize_tensor(entry, content, self._bits)
        return pack(entry, content) if is_blocked(entry.type) else dequantize(entry, content)

    def _table(self) -> Table:
        entry = self._header.tensors[EMBEDDING]
        if stays_in_table(entry.type) and not (self._bits and can_be_quantized(entry)):
            return self._read(EMBEDDING).view("<f2").reshape(entry.shape)
        return self._matrix(EMBEDDING)


def row_count(matrix: Table) -> int:
    return (matrix.scales if isinstance(matrix, PackedBlocks) else matrix).shape[0]


def _part(together: Linear, index: int, shape: tuple[int, ...]) -> Linear:
    """`shape`: experts, rows, columns."""
    rows = slice(index * shape[1], (index + 1) * shape[1])
    matrix = together.matrix
    if not isinstance(matrix, PackedBlocks):
        own: Matrix = matrix.reshape(-1, shape[2])[rows]
    else:
        offsets = None if matrix.offsets is None else matrix.offsets[rows]
        own = replace(matrix, codes=matrix.codes[rows], scales=matrix.scales[rows], offsets=offsets)
    return Linear(own, None if together.bias is None else together.bias[index])


def _join(*linears: Linear) -> tuple[Linear, ...]:
    """Matrices of one input below one another, as one, where their forms allow it: one kernel call, not three."""
    joined = _join_matrices([linear.matrix for linear in linears])
    return linears if joined is None else (Linear(joined, _join_biases(linears)),)


def _join_biases(linears: tuple[Linear, ...]) -> Floats | None:
    if all(linear.bias is None for linear in linears):
        return None
    missing = [np.zeros(row_count(linear.matrix), np.float32) for linear in linears]
    return np.concatenate(
        [zeros if linear.bias is None else linear.bias for linear, zeros in zip(linears, missing, strict=True)]
    )


def _join_matrices(matrices: list[Matrix]) -> Matrix | None:
    if all(isinstance(matrix, np.ndarray) for matrix in matrices):
        return np.concatenate([matrix for matrix in matrices if isinstance(matrix, np.ndarray)])
    packed = [matrix for matrix in matrices if isinstance(matrix, PackedBlocks)]
    if len(packed) < len(matrices) or len({_form(matrix) for matrix in packed}) > 1:
        return None
    offsets = [matrix.offsets for matrix in packed if matrix.offsets is not None]
    return PackedBlocks(
        packed[0].bits,
        packed[0].block_size,
        np.concatenate([matrix.codes for matrix in packed]),
        np.concatenate([matrix.scales for matrix in packed]),
        np.concatenate(offsets) if offsets else None,
    )


def _form(matrix: PackedBlocks) -> tuple[int, int, bool]:
    return matrix.bits, matrix.block_size, matrix.offsets is None
