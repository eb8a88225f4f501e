"""Collects the nodes and constants of an ONNX model, whose large constants stay outside of its bytes.

Operators of the domain `com.microsoft` are described in
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md. The weights are handed to the session as
they are; a model knows only their names, types and shapes.
"""

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import onnx
from msgspec import Struct
from numpy.typing import NDArray

from covey.checkpoints.blocks import PackedBlocks

MICROSOFT: Final = "com.microsoft"
OPSET: Final = 21
IR_VERSION: Final = 10
KEPT: Final = "prepacked_0"  # ONNX Runtime's name for where a packed constant is
INT8_ACCUMULATION: Final = 4  # `accuracy_level`: activations are quantised to 8 bits per block, as llama.cpp does
FLOAT_ACCUMULATION: Final = 0  # they stay as they are: slower, and the same whether a token is computed alone or not
INLINE_BYTES_MAX: Final = 1024  # smaller constants live in the model, where the optimiser may read them


class Kept(Struct, frozen=True):
    """A packed matrix in a file. The codes and `scales` that the model names are blanks, which only tell it apart."""

    file: str
    blank_at: int  # where in the file zeros are
    place: str  # ONNX Runtime's mark, and where it is packed
    scales: NDArray[np.float32]


class GraphBuilder:
    """Collects nodes and constants under fresh names."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, NDArray[Any]] = {}
        self._inline: list[onnx.TensorProto] = []
        self._kept: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._is_in_branch = False

    def input(self, name: str, dtype: Any, shape: list[int | str]) -> str:
        self._inputs.append(_value(name, dtype, shape))
        return name

    def output(self, name: str, dtype: Any, shape: list[int | str]) -> None:
        self._outputs.append(_value(name, dtype, shape))

    def constant(self, name: str, value: NDArray[Any]) -> str:
        if value.nbytes <= INLINE_BYTES_MAX and self._is_in_branch:
            self.nodes.append(_constant(name, value))
        elif value.nbytes <= INLINE_BYTES_MAX:
            self._inline.append(onnx.numpy_helper.from_array(value, name))
        else:
            self.weights[name] = np.ascontiguousarray(value)
        return name

    def kept(self, name: str, shape: tuple[int, ...], value: Kept) -> str:
        """A constant of `shape`, bytes, that lies packed in a file."""
        self._kept.append(_external(name, np.uint8, shape))
        entries = {"location": value.file, "offset": value.blank_at, "length": math.prod(shape), KEPT: value.place}
        for key, text in entries.items():
            self._kept[-1].external_data.add(key=key, value=str(text))
        return name

    def matmul_blocks(self, inputs: list[str], output: str, matrix: PackedBlocks, accuracy_level: int) -> str:
        """`inputs`: activations, codes, scales, and zeros where they are not half of what the codes' bits hold."""
        rows, blocks = matrix.scales.shape
        return self.node(
            "MatMulNBits", inputs, output, MICROSOFT,
            N=rows, K=blocks * matrix.block_size, bits=matrix.bits, block_size=matrix.block_size,
            accuracy_level=accuracy_level,
        )  # fmt: skip

    def node(self, operator: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        """Adds a node with one output, and returns its name."""
        self.nodes.append(onnx.helper.make_node(operator, inputs, [output], domain=domain, **attributes))
        return output

    def nodes_with(self, operator: str, inputs: list[str], outputs: list[str], domain: str, **attributes: Any) -> None:
        """Adds a node with several outputs."""
        self.nodes.append(onnx.helper.make_node(operator, inputs, outputs, domain=domain, **attributes))

    def choice(self, name: str, condition: str, taken: Callable[[], str], otherwise: NDArray[Any]) -> str:
        """What `taken` adds is computed only where the condition holds; else the result is the constant `otherwise`.

        Large constants lie outside of the branch, as all do, and small ones inside: each from outside takes time, also
        where the branch is not taken. A branch in a branch would be slow: weights from so far out are not prepacked.
        """
        assert not self._is_in_branch
        outside, self.nodes, self._is_in_branch = self.nodes, [], True
        result = taken()
        inside, self.nodes, self._is_in_branch = self.nodes, outside, False
        then, other = _branch(inside, result), _branch([_constant(f"{name}.not", otherwise)], f"{name}.not")
        self.nodes.append(onnx.helper.make_node("If", [condition], [name], then_branch=then, else_branch=other))
        return name

    def norm(self, name: str, source: str, scale: NDArray[np.float32], epsilon: float) -> str:
        """The RMS norm over the last axis."""
        weight = self.constant(f"{name}.weight", scale)
        return self.node("SimplifiedLayerNormalization", [source, weight], name, axis=-1, epsilon=epsilon)

    def model(self) -> bytes:
        outside = [_outside(name, value) for name, value in self.weights.items()]
        constants = [*self._inline, *self._kept, *outside]
        graph = onnx.helper.make_graph(self.nodes, "stage", self._inputs, self._outputs, constants)
        opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(MICROSOFT, 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        return model.SerializeToString()


def _constant(name: str, value: NDArray[Any]) -> onnx.NodeProto:
    return onnx.helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(value, name))


def _branch(nodes: list[onnx.NodeProto], output: str) -> onnx.GraphProto:
    outputs = [onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None)]
    return onnx.helper.make_graph(nodes, output, [], outputs)


def _value(name: str, dtype: Any, shape: list[int | str]) -> onnx.ValueInfoProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return onnx.helper.make_tensor_value_info(name, kind, shape)


def _outside(name: str, value: NDArray[Any]) -> onnx.TensorProto:
    """Stands for a tensor that the session is given apart from the model; the location is never opened."""
    tensor = _external(name, value.dtype, value.shape)
    tensor.external_data.add(key="location", value="given-apart")
    return tensor


def _external(name: str, dtype: Any, shape: tuple[int, ...]) -> onnx.TensorProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return onnx.TensorProto(name=name, data_type=kind, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
