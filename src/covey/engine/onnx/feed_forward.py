"""Adds the feed-forward block of one layer, dense or a mixture of experts.

Of experts only those that a token uses are computed, in branches that the others' are not taken. Why not through the
operator that was made for it stands in docs/decisions/0007-one-graph-builder.md.
"""

from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray

from covey.engine.onnx.architecture import Architecture, Experts
from covey.engine.onnx.builder import MICROSOFT, GraphBuilder
from covey.engine.onnx.products import Products
from covey.engine.onnx.weights import ExpertsWeights, FeedForwardWeights, Linear

CLIP: Final = 7.0  # of gpt-oss, and the steepness of its activation
CLIPPED_STEEPNESS: Final = 1.702


class FeedForwardGraph:
    def __init__(self, builder: GraphBuilder, products: Products, architecture: Architecture) -> None:
        self._builder = builder
        self._products = products
        self._architecture = architecture

    def add(self, name: str, source: str, weights: FeedForwardWeights | ExpertsWeights) -> str:
        """[tokens, hidden] to the same."""
        if isinstance(weights, FeedForwardWeights):
            return self._dense(name, source, weights)
        assert self._architecture.experts is not None
        return self._mixture(name, source, weights, self._architecture.experts)

    def _dense(self, name: str, source: str, weights: FeedForwardWeights) -> str:
        gate, up = self._gate_up(name, source, weights.gate_up)
        return self._products.linear(f"{name}.down", self._gated(name, gate, up), weights.down)

    def _gate_up(self, name: str, source: str, linears: tuple[Linear, ...]) -> list[str]:
        projected = self._products.linears(f"{name}.gate_up", source, linears)
        if len(projected) > 1:
            return projected
        halves = [f"{name}.gate", f"{name}.up"]
        self._builder.nodes_with("Split", projected, halves, "", axis=-1, num_outputs=2)
        return halves

    def _gated(self, name: str, gate: str, up: str) -> str:
        builder, experts = self._builder, self._architecture.experts
        if experts is not None and experts.is_clipped:
            return self._clipped(name, gate, up)
        if self._architecture.activation == "gelu_tanh":
            activated = builder.node("Gelu", [gate], f"{name}.gelu", approximate="tanh")
        else:
            activated = builder.node("QuickGelu", [gate], f"{name}.silu", MICROSOFT, alpha=1.0)
        return builder.node("Mul", [activated, up], f"{name}.gated")

    def _clipped(self, name: str, gate: str, up: str) -> str:
        builder = self._builder
        most = builder.constant(f"{name}.most", np.array(CLIP, np.float32))
        least = builder.constant(f"{name}.least", np.array(-CLIP, np.float32))
        one = builder.constant(f"{name}.one", np.array(1, np.float32))
        gate = builder.node("Min", [gate, most], f"{name}.gate.clipped")
        activated = builder.node("QuickGelu", [gate], f"{name}.silu", MICROSOFT, alpha=CLIPPED_STEEPNESS)
        up = builder.node("Clip", [up, least, most], f"{name}.up.clipped")
        return builder.node("Mul", [activated, builder.node("Add", [up, one], f"{name}.up.moved")], f"{name}.gated")

    def _mixture(self, name: str, source: str, weights: ExpertsWeights, experts: Experts) -> str:
        """Each token's rows are sorted by expert, computed, put back in order, weighted and added up."""
        builder = self._builder
        chosen, shares = self._route(name, source, weights.router, experts)
        every = builder.node("Shape", [chosen], f"{name}.every")
        order = self._sorted(f"{name}.order", chosen, every)
        used = builder.constant(f"{name}.used", np.array(experts.used_count, np.int64))
        tokens = builder.node("Div", [order, used], f"{name}.tokens")
        rows = builder.node("Gather", [source, tokens], f"{name}.rows", axis=0)
        computed = self._computed(name, rows, chosen, weights)
        back = self._sorted(f"{name}.back", order, every)
        ordered = builder.node("Gather", [computed, back], f"{name}.ordered", axis=0)
        return self._added_up(name, ordered, shares, experts)

    def _route(self, name: str, source: str, router: Linear, experts: Experts) -> tuple[str, str]:
        """The experts of all tokens, [tokens * used], and their shares, [tokens, used, 1], which add up to 1."""
        builder = self._builder
        scores = self._products.linear(f"{name}.router", source, router)
        count = builder.constant(f"{name}.router.count", np.array([experts.used_count], np.int64))
        best, chosen = f"{name}.router.best", f"{name}.router.chosen"
        builder.nodes_with("TopK", [scores, count], [best, chosen], "", axis=-1)
        shares = builder.node("Softmax", [best], f"{name}.router.shares", axis=-1)
        last = builder.constant(f"{name}.router.last", np.array([-1], np.int64))
        flat = builder.node("Reshape", [chosen, last], f"{name}.chosen")
        return flat, builder.node("Unsqueeze", [shares, last], f"{name}.shares")

    def _sorted(self, name: str, values: str, count: str) -> str:
        """The places of `values` in rising order; of equals the first one first."""
        self._builder.nodes_with("TopK", [values, count], [f"{name}.values", name], "", axis=0, largest=0)
        return name

    def _computed(self, name: str, rows: str, chosen: str, weights: ExpertsWeights) -> str:
        """`rows`: by rising expert."""
        builder, count = self._builder, len(weights.experts)
        axis = builder.constant(f"{name}.bounds.axis", np.array([1], np.int64))
        begins = self._split(f"{name}.begin", self._below(f"{name}.begins", chosen, np.arange(count), axis), count)
        ends = self._split(f"{name}.end", self._below(f"{name}.ends", chosen, np.arange(1, count + 1), axis), count)
        used = builder.node("Less", [f"{name}.begins", f"{name}.ends"], f"{name}.any")
        conditions = self._split(f"{name}.any", used, count)
        nothing = np.zeros((0, self._architecture.hidden_size), np.float32)

        def result(index: int) -> str:
            part, expert = f"{name}.{index}", weights.experts[index]
            return builder.choice(
                f"{part}.result",
                conditions[index],
                lambda: self._expert(part, rows, (begins[index], ends[index]), expert),
                nothing,
            )

        return builder.node("Concat", [result(index) for index in range(count)], f"{name}.computed", axis=0)

    def _below(self, name: str, chosen: str, experts: NDArray[np.int64], axis: str) -> str:
        """How many rows are for experts below each of these."""
        builder = self._builder
        limits = builder.constant(f"{name}.experts", experts[:, np.newaxis])
        below = builder.node("Less", [chosen, limits], f"{name}.below")
        counted = builder.node("Cast", [below], f"{name}.counted", to=onnx.TensorProto.INT64)
        return builder.node("ReduceSum", [counted, axis], name, keepdims=0)

    def _split(self, name: str, source: str, count: int) -> list[str]:
        parts = [f"{name}.{index}" for index in range(count)]
        self._builder.nodes_with("Split", [source], parts, "", axis=0, num_outputs=count)
        return parts

    def _expert(self, name: str, rows: str, bounds: tuple[str, str], weights: FeedForwardWeights) -> str:
        own = self._builder.node("Slice", [rows, *bounds], f"{name}.rows")
        return self._dense(name, own, weights)

    def _added_up(self, name: str, ordered: str, shares: str, experts: Experts) -> str:
        builder = self._builder
        shape = builder.constant(
            f"{name}.by_token.shape", np.array([-1, experts.used_count, self._architecture.hidden_size], np.int64)
        )
        axis = builder.constant(f"{name}.by_token.axis", np.array([1], np.int64))
        by_token = builder.node("Reshape", [ordered, shape], f"{name}.by_token")
        shared = builder.node("Mul", [by_token, shares], f"{name}.shared")
        return builder.node("ReduceSum", [shared, axis], f"{name}.mixed", keepdims=0)
