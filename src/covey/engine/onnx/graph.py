"""Builds the ONNX graph of one stage of a model: its layers, and on the last stage norm and output head.

One builder for all families; what differs stands in `Architecture`, and what a family doesn't want adds no operator.
Where a stage has several ranks, the graph is cut after each half of a layer, where the ranks' results are added up.
"""

from typing import Any, Final

import numpy as np
import onnx
from msgspec import Struct
from numpy.typing import NDArray

from covey.checkpoints.quantization import PackedBlocks
from covey.engine.onnx.architecture import Architecture, Rotary
from covey.engine.onnx.attention import AttentionGraph
from covey.engine.onnx.builder import MICROSOFT, GraphBuilder
from covey.engine.onnx.feed_forward import FeedForwardGraph
from covey.engine.onnx.kernel_file import KernelFile
from covey.engine.onnx.products import Products
from covey.engine.onnx.rotary import FloatType, Tables
from covey.engine.onnx.weights import Floats, HeadWeights, LayerWeights, Linear, Table

# Names of the graph's inputs and outputs, beside those of the attention.
TOKENS: Final = "tokens"  # [tokens] int64, into the first stage
HIDDEN: Final = "hidden"  # [tokens, hidden] float32, into the others
RESIDUAL: Final = "residual"  # [tokens, hidden] float32, into a part that is not the first
UPDATE: Final = "update"  # the same: what the half before has computed, of all ranks
ROWS: Final = "rows"  # [wanted] int64: the tokens whose logits are wanted
RESULT: Final = "result"  # [tokens, hidden], or from the last stage [wanted, vocabulary], float32


class StageGraph(Struct, frozen=True):
    """All of a stage, or a part of it. The outputs of a part that others follow are the next one's inputs."""

    model: bytes
    weights: dict[str, NDArray[Any]]  # what the model names but does not hold
    caches: tuple[str, ...]  # inputs that hold keys or values; the outputs are `updated` names
    has_attention: bool = True
    residual: str = ""  # the name of the output that becomes `RESIDUAL`
    partial: str = ""  # that of the one that, added up over the ranks, becomes `UPDATE`


class ModelGraph:
    """Adds a stage to a builder, layer by layer, so that a layer's weights can be read just before."""

    def __init__(
        self,
        architecture: Architecture,
        tables: dict[Rotary, Tables],
        table: Table | None,
        file: KernelFile | None,
        *,
        is_exact: bool,
        is_split: bool = False,
        cache_type: FloatType = np.float32,
    ) -> None:
        """`architecture`: with the heads of this rank; `table`: the token embeddings, on the first stage; `file`: for
        what `Products` keeps there; `cache_type`: of keys and values, and of the `tables`.
        """
        self._architecture = architecture
        self._tables, self._file = tables, file
        self._is_exact, self._is_split, self._cache_type = is_exact, is_split, cache_type
        self._parts: list[StageGraph] = []
        builder = self._begin_part()
        if table is None:
            self._residual = builder.input(HIDDEN, np.float32, ["tokens", architecture.hidden_size])
        else:
            embedded = self._embed(builder.input(TOKENS, np.int64, ["tokens"]), table)
            self._residual = self._scaled(embedded, architecture.embedding_scale)
        # What the last block computed and nobody has added to the residual yet; at first zero. Of the two kernels
        # for norms only the one with a sum is used there: they round apart, and the cuts would change the answers.
        self._update = builder.node("Sub", [self._residual, self._residual], "nothing")

    def add_layer(self, layer: int, weights: LayerWeights) -> None:
        normed = self._before(f"{layer}.attention_norm", weights.attention_norm)
        projected = self._products.linears(f"{layer}.qkv", normed, weights.query_key_value)
        attended = self._attending().add(layer, projected, weights)
        result = self._products.linear(f"{layer}.attention_output", attended, weights.attention_output)
        self._after(result, weights.attention_post_norm)
        normed = self._before(f"{layer}.feed_forward_norm", weights.feed_forward_norm)
        feed_forward = FeedForwardGraph(self._builder, self._products, self._architecture)
        result = feed_forward.add(f"{layer}.feed_forward", normed, weights.feed_forward)
        self._after(result, weights.feed_forward_post_norm)

    def finish(self, head: HeadWeights | None) -> tuple[StageGraph, ...]:
        """Ends the graph with the activations for the next stage, or with the wanted rows' logits: all parts of it."""
        builder = self._builder
        if head is None:
            builder.node("Add", [self._residual, self._update], RESULT)
            builder.output(RESULT, np.float32, ["tokens", self._architecture.hidden_size])
        else:
            self._add_head(head)
        return (*self._parts, self._part())

    def _begin_part(self) -> GraphBuilder:
        self._builder = GraphBuilder()
        self._products = Products(self._builder, self._file, is_exact=self._is_exact)
        self._attention: AttentionGraph | None = None
        return self._builder

    def _part(self, residual: str = "", partial: str = "") -> StageGraph:
        caches = () if self._attention is None else tuple(self._attention.caches)
        has_attention = self._attention is not None
        return StageGraph(self._builder.model(), self._builder.weights, caches, has_attention, residual, partial)

    def _attending(self) -> AttentionGraph:
        if self._attention is None:
            self._attention = AttentionGraph(self._builder, self._architecture, self._tables, self._cache_type)
        return self._attention

    def _cut(self, result: str) -> str:
        """Ends a part with this rank's `result`, and begins the next with what the results of all add up to."""
        shape: list[int | str] = ["tokens", self._architecture.hidden_size]
        for output in (self._residual, result):
            self._builder.output(output, np.float32, shape)
        self._parts.append(self._part(self._residual, result))
        builder = self._begin_part()
        self._residual = builder.input(RESIDUAL, np.float32, shape)
        return builder.input(UPDATE, np.float32, shape)

    def _add_head(self, head: HeadWeights) -> None:
        builder = self._builder
        builder.input(ROWS, np.int64, ["wanted"])
        self._residual = builder.node("Gather", [self._residual, ROWS], "wanted.residual", axis=0)
        self._update = builder.node("Gather", [self._update, ROWS], "wanted.update", axis=0)
        normed = self._summed_norm("output_norm", head.norm)
        logits = self._output().linear("output", normed, Linear(head.output))
        logits = self._capped(self._scaled(logits, 1 / self._architecture.logit_divisor))
        builder.node("Identity", [logits], RESULT)
        builder.output(RESULT, np.float32, ["wanted", head.own_size])

    def _output(self) -> Products:
        """To pack a matrix takes three times its size for a moment, and this one may be as large as ten layers."""
        return Products(self._builder, None, is_exact=self._is_exact)

    def _embed(self, tokens: str, table: Table) -> str:
        """[tokens] to [tokens, hidden]. The operators don't check that a token is in the table."""
        builder = self._builder
        if not isinstance(table, PackedBlocks):
            rows = builder.node("Gather", [builder.constant("embedding", table), tokens], "embedding.rows", axis=0)
            return builder.node("Cast", [rows], "embedded", to=onnx.TensorProto.FLOAT)
        vocabulary_size, block_count = table.scales.shape
        codes = builder.constant("embedding.codes", table.codes.reshape(vocabulary_size, -1))
        scales = builder.constant("embedding.scales", table.scales)
        embedded = builder.node(
            "GatherBlockQuantized", [codes, tokens, scales], "embedding.scaled", MICROSOFT,
            bits=table.bits, block_size=table.block_size, gather_axis=0, quantize_axis=1,
        )  # fmt: skip
        if table.offsets is None:
            return embedded
        offsets = builder.constant("embedding.offsets", table.offsets[..., np.newaxis])
        offset = builder.node("Gather", [offsets, tokens], "embedding.offset", axis=0)
        blocked_shape = builder.constant("embedding.blocked.shape", np.array([-1, block_count, table.block_size]))
        blocked = builder.node("Reshape", [embedded, blocked_shape], "embedding.blocked")
        moved = builder.node("Add", [blocked, offset], "embedding.moved")
        flat_shape = builder.constant("embedding.shape", np.array([-1, self._architecture.hidden_size]))
        return builder.node("Reshape", [moved, flat_shape], "embedded")

    def _before(self, name: str, norm: Floats | None) -> str:
        """What a block reads: the residual with all that is pending, and normed where the family does that."""
        if norm is not None:
            return self._summed_norm(name, norm)
        self._residual = self._builder.node("Add", [self._residual, self._update], f"{name}.sum")
        return self._residual

    def _after(self, result: str, norm: Floats | None) -> None:
        """What a block has computed is pending."""
        if self._is_split:
            result = self._cut(result)
        if norm is not None:
            result = self._builder.norm(f"{result}.normed", result, norm, self._architecture.epsilon)
        self._update = self._scaled(result, self._architecture.residual_scale)

    def _summed_norm(self, name: str, scale: Floats) -> str:
        """Adds what is pending to the residual, and norms the sum."""
        weight = self._builder.constant(f"{name}.weight", scale)
        self._builder.nodes_with(
            "SkipSimplifiedLayerNormalization", [self._residual, self._update, weight],
            [name, "", "", f"{name}.sum"], MICROSOFT, epsilon=self._architecture.epsilon,
        )  # fmt: skip
        self._residual, self._update = f"{name}.sum", ""
        return name

    def _scaled(self, source: str, scale: float) -> str:
        if scale == 1.0:
            return source
        factor = self._builder.constant(f"{source}.scale", np.array(scale, np.float32))
        return self._builder.node("Mul", [source, factor], f"{source}.times")

    def _capped(self, logits: str) -> str:
        cap = self._architecture.logit_soft_cap
        if not cap:
            return logits
        small = self._builder.node("Tanh", [self._scaled(logits, 1 / cap)], f"{logits}.bent")
        return self._scaled(small, cap)
