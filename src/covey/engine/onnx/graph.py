"""Builds the ONNX graph of one stage of a Llama model: its layers, and on the last stage norm and output head.

Operators of the domain `com.microsoft` are described in
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md. The weights stay outside of the model's
bytes and are handed to the session as they are; a graph knows only their names, types and shapes.
"""

from typing import Any, Final

import msgspec
import numpy as np
import onnx
from msgspec import Struct
from numpy.typing import NDArray

from covey.checkpoints.quantization import PackedBlocks
from covey.engine.onnx.settings import LlamaSettings
from covey.engine.onnx.weights import Floats, HeadWeights, LayerWeights, Matrix, Table

MICROSOFT: Final = "com.microsoft"
OPSET: Final = 21
IR_VERSION: Final = 10
INT8_ACCUMULATION: Final = 4  # `accuracy_level`: activations are quantised to 8 bits per block, as llama.cpp does
FLOAT_ACCUMULATION: Final = 0  # they stay as they are: slower, and the same whether a token is computed alone or not
BYTE_BITS: Final = 8
INLINE_BYTES_MAX: Final = 1024  # smaller constants live in the model, where the optimiser may read them

# Names of the graph's inputs and outputs.
TOKENS: Final = "tokens"  # [tokens] int64, into the first stage
HIDDEN: Final = "hidden"  # [tokens, hidden] float32, into the others
ENDS: Final = "ends"  # [batch] int32: last position of each sequence in this step
LONGEST: Final = "longest"  # [1] int32: tokens of the longest sequence, this step's included
LAYOUT: Final = "layout"  # [3] int64: batch, tokens of each, -1
ROWS: Final = "rows"  # [wanted] int64: the tokens whose logits are wanted
RESULT: Final = "result"  # [tokens, hidden], or from the last stage [wanted, vocabulary], float32


class StageGraph(Struct, frozen=True):
    model: bytes
    weights: dict[str, NDArray[Any]]  # what the model names but does not hold
    caches: tuple[str, ...]  # inputs that hold keys or values; the outputs are `updated` names


def updated(cache: str) -> str:
    """The output that is the cache after the step."""
    return f"{cache}.updated"


class GraphBuilder:
    """Collects nodes and constants under fresh names."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, NDArray[Any]] = {}
        self._inline: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: Any, shape: list[int | str]) -> str:
        self._inputs.append(_value(name, dtype, shape))
        return name

    def output(self, name: str, dtype: Any, shape: list[int | str]) -> None:
        self._outputs.append(_value(name, dtype, shape))

    def constant(self, name: str, value: NDArray[Any]) -> str:
        if value.nbytes <= INLINE_BYTES_MAX:
            self._inline.append(onnx.numpy_helper.from_array(value, name))
        else:
            self.weights[name] = np.ascontiguousarray(value)
        return name

    def node(self, operator: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        """Adds a node with one output, and returns its name."""
        self.nodes.append(onnx.helper.make_node(operator, inputs, [output], domain=domain, **attributes))
        return output

    def nodes_with(self, operator: str, inputs: list[str], outputs: list[str], domain: str, **attributes: Any) -> None:
        """Adds a node with several outputs."""
        self.nodes.append(onnx.helper.make_node(operator, inputs, outputs, domain=domain, **attributes))

    def model(self) -> bytes:
        outside = [_outside(name, value) for name, value in self.weights.items()]
        graph = onnx.helper.make_graph(self.nodes, "stage", self._inputs, self._outputs, [*self._inline, *outside])
        opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(MICROSOFT, 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        return model.SerializeToString()


class LlamaGraph:
    """Adds a stage to a builder, layer by layer, so that a layer's weights can be read just before."""

    def __init__(
        self, settings: LlamaSettings, rotary: tuple[Floats, Floats], table: Table | None, *, is_exact: bool
    ) -> None:
        """`table`: the token embeddings, on the first stage."""
        self._settings = settings
        self._accuracy_level = FLOAT_ACCUMULATION if is_exact else INT8_ACCUMULATION
        self._builder = GraphBuilder()
        self._caches: list[str] = []
        builder = self._builder
        if table is None:
            self._residual = builder.input(HIDDEN, np.float32, ["tokens", settings.hidden_size])
        else:
            self._residual = self._embed(builder.input(TOKENS, np.int64, ["tokens"]), table)
        # What the last block computed and nobody has added to the residual yet; at first zero. Of the two kernels
        # for norms only the one with a sum is used: they round apart, and a model's cuts would change its answers.
        self._update = builder.node("Sub", [self._residual, self._residual], "nothing")
        builder.input(ENDS, np.int32, ["batch"])
        builder.input(LONGEST, np.int32, [1])
        builder.input(LAYOUT, np.int64, [3])
        builder.constant("cosines", rotary[0])
        builder.constant("sines", rotary[1])
        builder.constant("flat", np.array([-1, settings.query_size], np.int64))

    def add_layer(self, layer: int, weights: LayerWeights) -> None:
        normed = self._norm(f"{layer}.attention_norm", weights.attention_norm)
        attended = self._attention(layer, self._matmuls(f"{layer}.qkv", normed, weights.query_key_value))
        (self._update,) = self._matmuls(f"{layer}.attention_output", attended, (weights.attention_output,))
        normed = self._norm(f"{layer}.feed_forward_norm", weights.feed_forward_norm)
        gate, up = self._gate_up(layer, normed, weights.gate_up)
        activated = self._builder.node("QuickGelu", [gate], f"{layer}.silu", MICROSOFT, alpha=1.0)
        product = self._builder.node("Mul", [activated, up], f"{layer}.gated")
        (self._update,) = self._matmuls(f"{layer}.down", product, (weights.down,))

    def finish(self, head: HeadWeights | None) -> StageGraph:
        """Ends the graph with the activations for the next stage, or with the wanted rows' logits."""
        builder = self._builder
        if head is None:
            builder.node("Add", [self._residual, self._update], RESULT)
            builder.output(RESULT, np.float32, ["tokens", self._settings.hidden_size])
        else:
            self._add_head(head)
        return StageGraph(builder.model(), builder.weights, tuple(self._caches))

    def _add_head(self, head: HeadWeights) -> None:
        builder = self._builder
        builder.input(ROWS, np.int64, ["wanted"])
        self._residual = builder.node("Gather", [self._residual, ROWS], "wanted.residual", axis=0)
        self._update = builder.node("Gather", [self._update, ROWS], "wanted.update", axis=0)
        normed = self._norm("output_norm", head.norm)
        (logits,) = self._matmuls("output", normed, (head.output,))
        builder.node("Identity", [logits], RESULT)
        builder.output(RESULT, np.float32, ["wanted", head.vocabulary_size])

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
        flat_shape = builder.constant("embedding.shape", np.array([-1, self._settings.hidden_size]))
        return builder.node("Reshape", [moved, flat_shape], "embedded")

    def _norm(self, name: str, scale: Floats) -> str:
        """Adds what is pending to the residual, and norms the sum."""
        weight = self._builder.constant(f"{name}.weight", scale)
        self._builder.nodes_with(
            "SkipSimplifiedLayerNormalization", [self._residual, self._update, weight],
            [name, "", "", f"{name}.sum"], MICROSOFT, epsilon=self._settings.epsilon,
        )  # fmt: skip
        self._residual, self._update = f"{name}.sum", ""
        return name

    def _attention(self, layer: int, projected: list[str]) -> str:
        """Rotates, appends to the cache in place, attends; [tokens, query size]."""
        builder, settings = self._builder, self._settings
        batched = [builder.node("Reshape", [name, LAYOUT], f"{name}.batched") for name in projected]
        query_key_value = batched if len(batched) > 1 else [batched[0], "", ""]
        caches = [self._cache(layer, "keys"), self._cache(layer, "values")]
        inputs = [*query_key_value, *caches, ENDS, LONGEST, "cosines", "sines"]
        outputs = [f"{layer}.attended", *(updated(cache) for cache in caches)]
        builder.nodes_with(
            "GroupQueryAttention", inputs, outputs, MICROSOFT,
            num_heads=settings.head_count, kv_num_heads=settings.kv_head_count, do_rotary=1, rotary_interleaved=1,
        )  # fmt: skip
        return builder.node("Reshape", [outputs[0], "flat"], f"{layer}.attended.flat")

    def _cache(self, layer: int, kind: str) -> str:
        name = f"{layer}.{kind}"
        shape: list[int | str] = ["batch", self._settings.kv_head_count, "context", self._settings.head_size]
        self._builder.input(name, np.float32, shape)
        self._builder.output(updated(name), np.float32, shape)
        self._caches.append(name)
        return name

    def _gate_up(self, layer: int, source: str, matrices: tuple[Matrix, ...]) -> list[str]:
        projected = self._matmuls(f"{layer}.gate_up", source, matrices)
        if len(projected) > 1:
            return projected
        halves = [f"{layer}.gate", f"{layer}.up"]
        self._builder.nodes_with("Split", projected, halves, "", axis=-1, num_outputs=2)
        return halves

    def _matmuls(self, name: str, source: str, matrices: tuple[Matrix, ...]) -> list[str]:
        """`source` times each matrix, transposed. The block sums of `source` are computed once for all of them."""
        sums: dict[int, str] = {}
        results: list[str] = []
        for index, matrix in enumerate(matrices):
            own_name = f"{name}.{index}"
            if not isinstance(matrix, PackedBlocks):
                weight = self._builder.constant(f"{own_name}.weight", matrix)
                results.append(self._builder.node("Gemm", [source, weight], own_name, transB=1))
                continue
            if matrix.offsets is not None and matrix.block_size not in sums:
                sums[matrix.block_size] = self._block_sums(name, source, matrix)
            results.append(self._matmul_blocks(own_name, source, matrix, sums.get(matrix.block_size, "")))
        return results

    def _block_sums(self, name: str, source: str, matrix: PackedBlocks) -> str:
        builder = self._builder
        blocks = matrix.scales.shape[1]
        shape = builder.constant(f"{name}.blocked.shape", np.array([-1, blocks, matrix.block_size], np.int64))
        axis = builder.constant(f"{name}.blocked.axis", np.array([2], np.int64))
        blocked = builder.node("Reshape", [source, shape], f"{name}.blocked")
        return builder.node("ReduceSum", [blocked, axis], f"{name}.sums", keepdims=0)

    def _matmul_blocks(self, name: str, source: str, matrix: PackedBlocks, sums: str) -> str:
        """Codes times scales, and where blocks have an offset, the sums of the blocks' activations times offsets.

        With (code - zero) * scale + offset for a weight, both together are exact; the operator alone takes offsets
        only in a form that is a hundred times slower.
        """
        scaled_name = name if matrix.offsets is None else f"{name}.scaled"
        if matrix.bits == BYTE_BITS and self._accuracy_level == FLOAT_ACCUMULATION:
            scaled = self._matmul_halves(scaled_name, source, matrix)
        else:
            scaled = self._matmul_codes(scaled_name, source, matrix)
        if matrix.offsets is None:
            return scaled
        offsets = self._builder.constant(f"{name}.offsets", matrix.offsets)
        return self._builder.node("Gemm", [sums, offsets, scaled], name, transB=1)

    def _matmul_halves(self, name: str, source: str, matrix: PackedBlocks) -> str:
        """A code of 8 bits as two of 4: code - 128 is 16 * (high - 8) + low.

        The operator has a kernel for 4 bits and floats alone. With 8 it unpacks the whole matrix for every token, which
        takes 20 times as long.
        """
        high_codes, low_codes = halves(matrix.codes)
        high = msgspec.structs.replace(matrix, codes=high_codes, scales=16 * matrix.scales, bits=BYTE_BITS // 2)
        low = msgspec.structs.replace(matrix, codes=low_codes, bits=BYTE_BITS // 2)
        rows, blocks = matrix.scales.shape
        zeros = self._builder.constant(f"{name}.low.zeros", np.zeros((rows, -(-blocks // 2)), np.uint8))
        products = [
            self._matmul_codes(f"{name}.high", source, high),
            self._matmul_codes(f"{name}.low", source, low, zeros),
        ]
        return self._builder.node("Add", products, name)

    def _matmul_codes(self, name: str, source: str, matrix: PackedBlocks, *zeros: str) -> str:
        """Without `zeros`, a zero is half of what the codes' bits hold."""
        builder = self._builder
        rows, blocks = matrix.scales.shape
        codes = builder.constant(f"{name}.codes", matrix.codes)
        scales = builder.constant(f"{name}.scales", matrix.scales.reshape(-1))
        return builder.node(
            "MatMulNBits", [source, codes, scales, *zeros], name, MICROSOFT,
            N=rows, K=blocks * matrix.block_size, bits=matrix.bits, block_size=matrix.block_size,
            accuracy_level=self._accuracy_level,
        )  # fmt: skip


def halves(codes: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The high and the low 4 bits of codes of 8, each two to a byte, the first in its low bits."""
    first, second = codes[..., 0::2], codes[..., 1::2]
    low, four = np.uint8(0x0F), np.uint8(4)
    return (first >> four) | (second & ~low), (first & low) | (second << four)


def _value(name: str, dtype: Any, shape: list[int | str]) -> onnx.ValueInfoProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return onnx.helper.make_tensor_value_info(name, kind, shape)


def _outside(name: str, value: NDArray[Any]) -> onnx.TensorProto:
    """Stands for a tensor that the session is given apart from the model; the location is never opened."""
    tensor = onnx.TensorProto()
    tensor.name = name
    tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    tensor.dims.extend(value.shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    location = tensor.external_data.add()
    location.key, location.value = "location", "given-apart"
    return tensor
