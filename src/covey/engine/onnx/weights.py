"""Reads a stage's tensors from a model's files, and no others, into the forms that the graph takes."""

import math

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from covey.checkpoints.checkpoint import EMBEDDING, OUTPUT, Checkpoint, TensorEntry, TensorReader, has_rows
from covey.checkpoints.quantization import PackedBlocks, dequantize, is_blocked, pack, stays_in_table
from covey.checkpoints.quantizing import can_be_quantized, quantize_tensor
from covey.engine.onnx import tensors
from covey.engine.onnx.architecture import Architecture, Rotary
from covey.engine.onnx.cutting import Floats, Matrix, Table, columns_of, in_all, rows_of
from covey.engine.onnx.rotary import FloatType, Tables, factors_for, rotary_tables
from covey.engine.onnx.share import WHOLE, Cut, Share
from covey.engine.onnx.tensors import OUTPUT_NORM
from covey.schema.model import Shard


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
    query_key_value: tuple[Linear, ...]  # one where the three could be joined, else three; queries come out scaled
    query_norm: Floats | None  # scales them, where there is one
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
    vocabulary_size: int  # of which this rank may have a part

    @property
    def own_size(self) -> int:
        return row_count(self.output)


class StageFile:
    """The part of a model file that one rank of a stage is made of."""

    def __init__(
        self,
        reader: TensorReader,
        header: Checkpoint,
        architecture: Architecture,
        shard: Shard,
        context_length: int,
        bits: int | None = None,
        rank: int = 0,
        rank_count: int = 1,
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
        self.share = Share(header, architecture, rank, rank_count, bits)

    @property
    def bytes_total(self) -> int:
        return sum(self._byte_count(name) for name in self._needed)

    def read_layer(self, layer: int) -> LayerWeights:
        """Raises `CheckpointError`, `OSError`."""
        architecture = self._architecture
        post_norm = "post_attention_norm" if architecture.has_post_norms else ""
        query_norm, query_key_value = self._norm(layer, "attn_q_norm"), self._query_key_value(layer)
        # The kernels for one new token are up to twice as fast where no scale is left for the operator.
        if query_norm is None:
            query, *rest = query_key_value
            query_key_value = (self._scaled_queries(query), *rest)
        else:
            query_norm = query_norm * np.float32(architecture.attention_scale)
        return LayerWeights(
            attention_norm=self._norm(layer, "attn_norm"),
            query_key_value=query_key_value,
            query_norm=query_norm,
            key_norm=self._norm(layer, "attn_k_norm"),
            sinks=self._sinks(layer),
            attention_output=self._linear(layer, "attn_output"),
            attention_post_norm=self._norm(layer, post_norm),
            feed_forward_norm=self._norm(layer, architecture.feed_forward_norm),
            feed_forward=self._feed_forward(layer),
            feed_forward_post_norm=self._norm(layer, "post_ffw_norm"),
        )

    def read_rotary_tables(self, dtype: FloatType = np.float32) -> dict[Rotary, Tables]:
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
            tables[rotary] = rotary_tables(rotary, self._context_length, factors, dtype)
        return tables

    def read_ends(self) -> tuple[Table | None, HeadWeights | None]:
        """What the first and the last stage have beside layers; a tied embedding is read once for both."""
        table = self._table() if self._shard.layer_start == 0 else None
        if self._shard.layer_end != self._shard.layer_count:
            return table, None
        norm = self._floats(OUTPUT_NORM) + np.float32(self._architecture.norm_offset)
        name = tensors.output_name(self._header)
        size, cut = self._header.tensors[name].shape[0], self.share.of_output(name)
        if table is None or name == OUTPUT:
            return table, HeadWeights(norm, self._matrix(name, cut), size)
        own = table if cut.rows is None else rows_of(table, cut.rows)
        output = own if isinstance(own, PackedBlocks) else own.astype(np.float32, copy=False)
        return table, HeadWeights(norm, output, size)

    def _query_key_value(self, layer: int) -> tuple[Linear, ...]:
        if self._architecture.is_joined:
            return (self._linear(layer, "attn_qkv"),)
        return _join(*(self._linear(layer, f"attn_{name}") for name in "qkv"))

    def _scaled_queries(self, linear: Linear) -> Linear:
        """`linear`: of the queries, and maybe of keys and values below them."""
        factors = np.ones(row_count(linear.matrix), np.float32)
        factors[: self.share.architecture.query_size] = self._architecture.attention_scale
        return _scaled(linear, factors)

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
        weight, bias = f"blk.{layer}.{name}.weight", f"blk.{layer}.{name}.bias"
        cut = self.share.of(weight)
        matrix = self._matrix(weight, cut)
        if bias not in self._header.tensors or not self.share.has_bias(bias):
            return Linear(matrix)
        values = self._floats(bias)
        if cut.rows is not None:
            values = np.concatenate([values[..., each.start : each.stop] for each in cut.rows], axis=-1)
        return Linear(matrix, values)

    def _experts(self, layer: int, name: str) -> list[Linear]:
        """One for each; their matrices are parts of one tensor."""
        count = self._header.tensors[f"blk.{layer}.{name}.weight"].shape[0]
        together = self._linear(layer, name)
        return [_part(together, index, count) for index in range(count)]

    def _sinks(self, layer: int) -> Floats | None:
        own, found = self.share.query_heads, self._optional(layer, "attn_sinks")
        return None if found is None else found[own.start : own.stop]

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

    def _matrix(self, name: str, cut: Cut = WHOLE) -> Matrix:
        """Matrices of several axes become one, below one another."""
        entry = self._header.tensors[name]
        if cut.rows is None:
            matrix = self._held(entry, self._read(name))
        elif has_rows(entry):
            matrix = self._held(*self._read_rows(entry, _below(entry, cut.rows)))
        else:
            matrix = rows_of(self._held(entry, self._read(name)), _below(entry, cut.rows))
        return matrix if cut.columns is None else columns_of(matrix, cut.columns)

    def _read_rows(self, entry: TensorEntry, rows: list[range]) -> tuple[TensorEntry, NDArray[np.uint8]]:
        content = self._reader.read_rows(entry, rows)
        self.bytes_read += content.size
        return replace(entry, shape=(sum(map(len, rows)), entry.shape[-1]), byte_count=content.size), content

    def _held(self, entry: TensorEntry, content: NDArray[np.uint8]) -> Matrix:
        if self._bits is not None and can_be_quantized(entry):
            return quantize_tensor(entry, content, self._bits)
        if is_blocked(entry.type):
            return pack(entry, content)
        return dequantize(entry, content).reshape(-1, entry.shape[-1])

    def _byte_count(self, name: str) -> int:
        """That are read of it."""
        entry = self._header.tensors[name]
        is_output = name == OUTPUT or (name == EMBEDDING and self._shard.layer_start > 0)
        rows = (self.share.of_output(name) if is_output else self.share.of(name)).rows
        if rows is None or name.endswith(".bias") or not has_rows(entry):
            return entry.byte_count if self._reads(name) else 0
        row_bytes = entry.byte_count // math.prod(entry.shape[:-1])
        return sum(map(len, _below(entry, rows))) * row_bytes

    def _reads(self, name: str) -> bool:
        return not (name.startswith("blk.") and name.endswith(".bias")) or self.share.has_bias(name)

    def _table(self) -> Table:
        entry = self._header.tensors[EMBEDDING]
        if stays_in_table(entry.type) and not (self._bits and can_be_quantized(entry)):
            return self._read(EMBEDDING).view("<f2").reshape(entry.shape)
        return self._matrix(EMBEDDING)


def row_count(matrix: Table) -> int:
    return (matrix.scales if isinstance(matrix, PackedBlocks) else matrix).shape[0]


def _below(entry: TensorEntry, rows: tuple[range, ...]) -> list[range]:
    """These rows of each of its matrices."""
    return in_all(rows, entry.shape[-2], math.prod(entry.shape[:-2]))


def _part(together: Linear, index: int, count: int) -> Linear:
    """One of `count` matrices that lie below one another."""
    size = row_count(together.matrix) // count
    own = rows_of(together.matrix, [range(index * size, (index + 1) * size)])
    return Linear(own, None if together.bias is None else together.bias[index])


def _scaled(linear: Linear, factors: Floats) -> Linear:
    """`factors`: of each row."""
    matrix, bias = linear.matrix, linear.bias
    if isinstance(matrix, PackedBlocks):
        offsets = None if matrix.offsets is None else matrix.offsets * factors[:, np.newaxis]
        scaled: Matrix = replace(matrix, scales=matrix.scales * factors[:, np.newaxis], offsets=offsets)
    else:
        scaled = matrix * factors[:, np.newaxis]
    return Linear(scaled, None if bias is None else bias * factors)


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
