"""Adds the attention of one layer: its cache in place, its way of turning, its window, norms, sinks and soft cap.

What the CPU's `GroupQueryAttention` honours of its attributes stands in docs/decisions/0007-one-graph-builder.md, and
is tested against plain arithmetic.
"""

from typing import Any, Final

import numpy as np
import onnx

from covey.engine.onnx.architecture import Architecture, Rotary
from covey.engine.onnx.builder import MICROSOFT, GraphBuilder
from covey.engine.onnx.rotary import FloatType, Tables
from covey.engine.onnx.weights import Floats, LayerWeights

# Names of the graph's inputs that say where sequences are.
ENDS: Final = "ends"  # [batch] int32: last position of each sequence in this step
LONGEST: Final = "longest"  # [1] int32: tokens of the longest sequence, this step's included
LAYOUT: Final = "layout"  # [3] int64: batch, tokens of each, -1

# What is larger becomes this in a cache of float16, which ends at 65,504: turning makes up to 1.9 times as much of it
# (the root of 2, and 1.35 where a context is stretched to 32 times), and an infinite key would make what follows NaN.
HALVES_MAX: Final = 32_768.0
HALVES_BOUNDS: Final = (
    ("halves.least", np.array(-HALVES_MAX, np.float32)),
    ("halves.most", np.array(HALVES_MAX, np.float32)),
)


def updated(cache: str) -> str:
    """The output that is the cache after the step."""
    return f"{cache}.updated"


class AttentionGraph:
    def __init__(
        self, builder: GraphBuilder, architecture: Architecture, tables: dict[Rotary, Tables], cache_type: FloatType
    ) -> None:
        """`cache_type`: also of the `tables`."""
        self.caches: list[str] = []
        self._builder = builder
        self._architecture = architecture
        builder.input(ENDS, np.int32, ["batch"])
        builder.input(LONGEST, np.int32, [1])
        builder.input(LAYOUT, np.int64, [3])
        builder.constant("flat", np.array([-1, architecture.query_size], np.int64))
        self._bounds = [] if cache_type is np.float32 else [builder.constant(*each) for each in HALVES_BOUNDS]
        self._tables = tables
        self._cache_type = cache_type
        self._named_tables: dict[Rotary, list[str]] = {}

    def add(self, layer: int, projected: list[str], weights: LayerWeights) -> str:
        """From query, key and value, in one or in three, to [tokens, query size]."""
        kind = self._architecture.layers[layer]
        query_key_value = [name and self._as_cached(name) for name in self._batched(layer, projected, weights)]
        caches = [self._cache(layer, "keys"), self._cache(layer, "values")]
        tables = ["", ""] if kind.rotary is None else self._tables_of(kind.rotary)
        inputs = [*query_key_value, *caches, ENDS, LONGEST, *tables]
        if weights.sinks is not None:
            inputs += ["", "", self._builder.constant(f"{layer}.sinks", weights.sinks.astype(self._cache_type))]
        outputs = [f"{layer}.attended", *(updated(cache) for cache in caches)]
        self._builder.nodes_with("GroupQueryAttention", _trimmed(inputs), outputs, MICROSOFT, **self._attributes(layer))
        flat = self._builder.node("Reshape", [outputs[0], "flat"], f"{layer}.attended.flat")
        if self._cache_type is np.float32:
            return flat
        return self._builder.node("Cast", [flat], f"{flat}.wide", to=onnx.TensorProto.FLOAT)

    def _as_cached(self, name: str) -> str:
        """Of the cache's type, as the operator takes all that it computes with."""
        if self._cache_type is np.float32:
            return name
        builder = self._builder
        clipped = builder.node("Clip", [name, *self._bounds], f"{name}.clipped")
        return builder.node("Cast", [clipped], f"{name}.halves", to=onnx.TensorProto.FLOAT16)

    def _tables_of(self, rotary: Rotary) -> list[str]:
        """Cosines and sines; a graph has only those that its layers use."""
        if rotary not in self._named_tables:
            index, tables = len(self._named_tables), zip(("cosines", "sines"), self._tables[rotary], strict=True)
            self._named_tables[rotary] = [self._builder.constant(f"{kind}.{index}", table) for kind, table in tables]
        return self._named_tables[rotary]

    def _attributes(self, layer: int) -> dict[str, Any]:
        architecture, kind = self._architecture, self._architecture.layers[layer]
        attributes: dict[str, Any] = {
            "num_heads": architecture.head_count,
            "kv_num_heads": architecture.kv_head_count,
            "scale": 1.0,  # queries come scaled
        }
        if kind.rotary is not None:
            attributes |= {"do_rotary": 1, "rotary_interleaved": int(architecture.is_interleaved)}
        if kind.window:
            attributes["local_window_size"] = kind.window
        if architecture.attention_soft_cap:
            attributes["softcap"] = architecture.attention_soft_cap
        return attributes

    def _batched(self, layer: int, projected: list[str], weights: LayerWeights) -> list[str]:
        builder = self._builder
        if weights.query_norm is not None and weights.key_norm is not None:
            query, key, value = projected if len(projected) > 1 else self._split(layer, projected[0])
            projected = [
                self._head_norm(query, weights.query_norm),
                self._head_norm(key, weights.key_norm),
                value,
            ]
        batched = [builder.node("Reshape", [name, LAYOUT], f"{name}.batched") for name in projected]
        return batched if len(batched) > 1 else [batched[0], "", ""]

    def _split(self, layer: int, joined: str) -> list[str]:
        query, key_value = self._architecture.query_size, self._architecture.kv_size
        sizes = self._builder.constant(f"{layer}.qkv.sizes", np.array([query, key_value, key_value], np.int64))
        parts = [f"{layer}.{name}" for name in ("query", "key", "value")]
        self._builder.nodes_with("Split", [joined, sizes], parts, "", axis=-1)
        return parts

    def _head_norm(self, source: str, scale: Floats) -> str:
        """Over each head, or over all of them, as the weight's size says."""
        builder = self._builder
        shape = builder.constant(f"{source}.heads.shape", np.array([-1, len(scale)], np.int64))
        heads = builder.node("Reshape", [source, shape], f"{source}.heads")
        return builder.norm(f"{source}.normed", heads, scale, self._architecture.epsilon)

    def _cache(self, layer: int, kind: str) -> str:
        name = f"{layer}.{kind}"
        shape: list[int | str] = ["batch", self._architecture.kv_head_count, "context", self._architecture.head_size]
        self._builder.input(name, self._cache_type, shape)
        self._builder.output(updated(name), self._cache_type, shape)
        self.caches.append(name)
        return name


def _trimmed(inputs: list[str]) -> list[str]:
    """Without the empty names at the end, which stand for inputs that are left out."""
    while inputs and not inputs[-1]:
        inputs = inputs[:-1]
    return inputs
