"""The ONNX Runtime sessions of one stage and the KV cache that they write in place."""

import ctypes
import math
import mmap
import sys
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Final

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from covey.engine.contract import Activations, Exchange
from covey.engine.onnx import attention, graph
from covey.engine.onnx.graph import StageGraph
from covey.engine.onnx.kernel_file import KernelFile
from covey.engine.onnx.rotary import FloatType
from covey.engine.onnx.runtime import FILE_FOLDER, new_options, open_session, shared

SPIN_US_MAX: Final = 50  # measured beside a busy program: 19 ms a token, 48 without a limit, 12 with the machine alone
BETWEEN: Final = 4  # arrays between the parts of a graph
BINDINGS_MAX: Final = 32  # ranges of slots whose cache slices stay bound; a binding names two arrays for each layer


class KvCache:
    """Keys and values of all layers and slots. Pages that no token has reached yet take no memory."""

    def __init__(self, names: tuple[str, ...], shape: tuple[int, int, int, int], dtype: FloatType = np.float32) -> None:
        self._arrays = {name: _untouched(shape, dtype) for name in names}  # [slots, heads, context, head size]

    def slices(self, slot: int, count: int) -> dict[str, NDArray[np.floating]]:
        """The part of `count` slots from `slot` on, contiguous."""
        return {name: array[slot : slot + count] for name, array in self._arrays.items()}

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """The tokens from `start` to `end` of one slot become those of another."""
        for array in self._arrays.values():
            array[target, :, start:end] = array[source, :, start:end]


def _untouched(shape: tuple[int, int, int, int], dtype: FloatType) -> NDArray[np.floating]:
    """Zeros that take memory page by page, as they are written to.

    NumPy asks for huge pages: then the first token of a slot takes the memory of all its context, or Linux joins pages
    to huge ones while the runner is idle. It gave 4 % at 2,000 tokens of context, and nothing at 500.
    """
    memory = mmap.mmap(-1, math.prod(shape) * np.dtype(dtype).itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


class StageSession:
    """Runs sequences of equal length that lie in neighbouring slots, through all parts of a stage's graph."""

    def __init__(
        self,
        parts: Sequence[StageGraph],
        cache: KvCache,
        file: KernelFile | None,
        *,
        thread_count: int,
        hidden_size: int,
        result_size: int,
    ) -> None:
        """`file`: what the parts' matrices are kept in; `result_size`: what this rank computes of it."""
        with file.named() if file else nullcontext("") as folder:
            self._parts = [_Part(_open(part, thread_count, folder), _without_weights(part)) for part in parts]
        self._cache = cache
        self._arrays = _Arrays(np.empty(0), np.empty((0, result_size), np.float32), ())
        self._hidden_size = hidden_size
        self._bindings: OrderedDict[tuple[int, int], _Binding] = OrderedDict()

    def run(
        self,
        slot: int,
        positions: list[int],
        values: Activations,
        rows: NDArray[np.int64] | None,
        exchange: Exchange,
    ) -> NDArray[np.float32]:
        """`values`: of all tokens, sequence by sequence; `positions`: where each sequence goes on.

        Returns [tokens, hidden], or where `rows` are wanted, the own part of [rows, vocabulary]; good until the next
        run.
        """
        self._make_room(values, len(values if rows is None else rows))
        binding = self._binding(slot, len(positions))
        token_count = len(values) // len(positions)
        binding.set_step(max(positions) + token_count, [position + token_count - 1 for position in positions])
        binding.set_values(token_count, values, rows)
        for part, bound, partial in binding.steps:
            part.session.run_with_iobinding(bound)
            if partial is not None:
                exchange.add_up(partial)
        return binding.result

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """As `KvCache` says."""
        self._cache.copy(source, target, start, end)

    def _make_room(self, values: Activations, result_count: int) -> None:
        """All bindings share arrays as large as the largest run: 32 of their own would be much for many slots and a
        large vocabulary. They double as they grow; what no run has reached takes no memory.
        """
        arrays = self._arrays
        if len(values) > len(arrays.values):
            dtype = np.int64 if values.ndim == 1 else np.float32
            tokens = max(len(values), 2 * len(arrays.values))
            between = () if len(self._parts) == 1 else tuple(self._hidden(tokens) for _ in range(BETWEEN))
            arrays = replace(arrays, values=np.empty((tokens, *values.shape[1:]), dtype), between=between)
        if result_count > len(arrays.result):
            size = max(result_count, 2 * len(arrays.result)), arrays.result.shape[1]
            arrays = replace(arrays, result=np.empty(size, np.float32))
        if arrays is not self._arrays:
            self._arrays = arrays
            self._bindings.clear()  # they hold on to the arrays before

    def _hidden(self, tokens: int) -> NDArray[np.float32]:
        return np.empty((tokens, self._hidden_size), np.float32)

    def _binding(self, slot: int, count: int) -> "_Binding":
        key = (slot, count)
        if key not in self._bindings:
            self._bindings[key] = _Binding(self._parts, self._cache.slices(slot, count), count, self._arrays)
            if len(self._bindings) > BINDINGS_MAX:
                self._bindings.popitem(last=False)
        self._bindings.move_to_end(key)
        return self._bindings[key]


class _Part(Struct, frozen=True):
    session: Any
    graph: StageGraph


class _Arrays(Struct, frozen=True):
    """What goes into a stage, comes out of it, and goes from part to part; a run has their beginnings."""

    values: Activations
    result: NDArray[np.float32]
    between: tuple[NDArray[np.float32], ...]  # residuals, updates: of the parts with even numbers, of the odd ones


class _Binding:
    """The inputs and outputs of a run on one range of slots.

    Arrays are bound when their shapes change, else written in place: binding 200 KB of logits afresh for every token
    costs more in page faults than the sampler does. `arrays` are shared.
    """

    def __init__(
        self, parts: Sequence[_Part], cache: dict[str, NDArray[np.floating]], count: int, arrays: _Arrays
    ) -> None:
        self._arrays = arrays
        self._bound = [(part, part.session.io_binding()) for part in parts]
        self.steps: list[tuple[_Part, Any, NDArray[np.float32] | None]] = []
        self.result = arrays.result[:0]
        self._values = arrays.values[:0]
        self._rows: NDArray[np.int64] | None = None
        self._ends = np.zeros(count, np.int32)
        self._longest = np.zeros(1, np.int32)
        self._layout = np.array([count, 0, -1], np.int64)
        places = {attention.ENDS: self._ends, attention.LONGEST: self._longest, attention.LAYOUT: self._layout}
        bound = {name: shared(value) for name, value in places.items()}
        for part, binding in self._bound:
            for name, value in bound.items() if part.graph.has_attention else ():
                binding.bind_ortvalue_input(name, value)
            for name in part.graph.caches:
                # The same memory as input and as output is how the operator knows to append in place.
                both = shared(cache[name])
                binding.bind_ortvalue_input(name, both)
                binding.bind_ortvalue_output(attention.updated(name), both)

    def set_step(self, longest: int, ends: list[int]) -> None:
        """`longest`: tokens of the longest sequence, this step's included; `ends`: last position of each."""
        self._longest[0] = longest
        self._ends[:] = ends

    def set_values(self, token_count: int, values: Activations, rows: NDArray[np.int64] | None) -> None:
        """`token_count`: of each sequence."""
        self._layout[1] = token_count
        result_count = len(values) if rows is None else len(rows)
        if values.shape != self._values.shape or result_count != len(self.result):
            self._bind_values(values, rows, result_count)
        self._values[:] = values
        if self._rows is not None and rows is not None:
            self._rows[:] = rows

    def _bind_values(self, values: Activations, rows: NDArray[np.int64] | None, result_count: int) -> None:
        self._values = self._arrays.values[: len(values)]
        self.result = self._arrays.result[:result_count]
        self._bound[0][1].bind_ortvalue_input(graph.TOKENS if values.ndim == 1 else graph.HIDDEN, shared(self._values))
        last = self._bound[-1][1]
        last.bind_ortvalue_output(graph.RESULT, shared(self.result))
        if rows is not None:
            self._rows = np.empty_like(rows)
            last.bind_ortvalue_input(graph.ROWS, shared(self._rows))
        self._bind_between(len(values))

    def _bind_between(self, token_count: int) -> None:
        """Each part reads what the one before wrote, and writes to the other arrays."""
        between = [each[:token_count] for each in self._arrays.between]
        bound = [shared(each) for each in between]
        self.steps = [(part, binding, None) for part, binding in self._bound]
        for index in range(len(self._bound) - 1):
            (part, writing), (_, reading), side = self._bound[index], self._bound[index + 1], 2 * (index % 2)
            writing.bind_ortvalue_output(part.graph.residual, bound[side])
            writing.bind_ortvalue_output(part.graph.partial, bound[side + 1])
            reading.bind_ortvalue_input(graph.RESIDUAL, bound[side])
            reading.bind_ortvalue_input(graph.UPDATE, bound[side + 1])
            self.steps[index] = (part, writing, between[side + 1])


def _without_weights(part: StageGraph) -> StageGraph:
    """What a binding has to know of it. A session packs what it multiplies by, and holds no second copy."""
    return replace(part, model=b"", weights={})


def _open(built: StageGraph, thread_count: int, folder: str) -> Any:
    """`folder`: where the file of kept matrices is."""
    options = new_options(thread_count)
    # Steps differ in length, and a plan of memory is kept for each length that comes up.
    options.enable_mem_pattern = False
    # Threads wait actively between the operators of a step, which pays, but not between steps. Nor for long: a thread
    # that another one holds up, on a core that a third program has, would burn what is left of its time slice.
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US_MAX))
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry(FILE_FOLDER, folder)
    return open_session(built.model, options, built.weights)


def give_back_memory() -> None:
    """Returns freed memory to the system where the C library has to be asked to (glibc on Linux)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
