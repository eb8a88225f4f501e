"""Collects the nodes and constants of an ONNX model, whose large constants stay outside of its bytes.

Operators of the domain `com.microsoft` are described in
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md. The weights are handed to the session as
they are; a model knows only their names, types and shapes.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

MICROSOFT: Final = "com.microsoft"
OPSET: Final = 21
IR_VERSION: Final = 10
INLINE_BYTES_MAX: Final = 1024  # smaller constants live in the model, where the optimiser may read them


class GraphBuilder:
    """Collects nodes and constants under fresh names."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, NDArray[Any]] = {}
        self._inline: list[onnx.TensorProto] = []
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
        graph = onnx.helper.make_graph(self.nodes, "stage", self._inputs, self._outputs, [*self._inline, *outside])
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
    tensor = onnx.TensorProto()
    tensor.name = name
    tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    tensor.dims.extend(value.shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    location = tensor.external_data.add()
    location.key, location.value = "location", "given-apart"
    return tensor
