"""What single operators of ONNX Runtime cost, in the forms that the engine could give them.

    python bench/operators.py binding FILE.gguf
    python bench/operators.py products [--shapes small large] [--rows 1 128] [--bits 2 4 8]
    python bench/operators.py levels FILE.gguf [--tokens 200]
    python bench/operators.py attention [--pasts 320 1000 4000] [--chunks 1 128] [--kinds float32 float16]

`binding` runs steps of one token of a model: bound once and kept, as the engine does; bound anew for each step; and
fed without binding. `products` times `MatMulNBits` by bits, block, zero points and `accuracy_level`, on random matrices
of SmolLM2's and of a 1 B model's shapes. `levels` compares a model's logits by `accuracy_level`. `attention` times
`GroupQueryAttention` by the type of its cache, with and without its newer kernels. What has several sizes or ways takes
turns; medians are told. What it means stands in docs/decisions/0013-what-operators-cost.md.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import numpy as np
from bare_engine import load, spec_of
from exactness import TEXT, engine_logits, tokens_of
from rich.console import Console
from rich.table import Table

from covey.engine.contract import Piece
from covey.engine.onnx import attention, graph, products
from covey.engine.onnx.builder import MICROSOFT, GraphBuilder
from covey.engine.onnx.runtime import new_options, open_session, shared
from covey.engine.onnx.session import SPIN_US_MAX

Step = Callable[[], Any]
FLOAT_BYTES: Final = 4
RANDOM: Final = np.random.default_rng(3)


def in_turn(ways: dict[Any, Step], rounds: int, seconds: float) -> dict[Any, float]:
    """Microseconds of each, the median of rounds, of which each repeats a way for about so long."""
    found: dict[Any, list[float]] = {way: [] for way in ways}
    for step in ways.values():
        step()
    for _ in range(rounds):
        for way, step in ways.items():
            found[way].append(microseconds(step, seconds))
    return {way: statistics.median(times) for way, times in found.items()}


def microseconds(step: Step, seconds: float) -> float:
    """The median of the runs that begin within `seconds`."""
    times: list[float] = []
    until = time.perf_counter() + seconds
    while not times or time.perf_counter() < until:
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times)


# ---- binding ----


class Decoding:
    """One step of one token of a loaded model, again and again at the same place, in several ways."""

    def __init__(self, model: Path, threads: int, context: int, past: int) -> None:
        stage = load(spec_of(model, threads, context))
        for start in range(0, past, 128):
            stage.run([Piece(0, start, min(128, past - start), wants_logits=False)], np.arange(min(128, past - start)))
        self._stage, self._past = stage, past
        inside: Any = stage._segments[0]._session  # noqa: SLF001 - it has no other door, and needs none
        self._session, self._part = inside._parts[0].session, inside._parts[0].graph  # noqa: SLF001
        self._caches = inside._cache.slices(0, 1)  # noqa: SLF001
        self._prepare: Any = functools.partial(self._prepare_kept, inside)
        self._result = np.empty((1, stage._segments[-1].result_size), np.float32)  # noqa: SLF001
        self._one, self._row = np.array([7], np.int64), np.zeros(1, np.int64)
        self._small = {
            attention.ENDS: np.array([past], np.int32),
            attention.LONGEST: np.array([past + 1], np.int32),
            attention.LAYOUT: np.array([1, 1, -1], np.int64),
            graph.TOKENS: self._one,
            graph.ROWS: self._row,
        }
        self._values = {name: shared(array) for name, array in (self._caches | self._small).items()}
        self._values[graph.RESULT] = shared(self._result)

    def ways(self) -> dict[str, Step]:
        return {
            "kept bindings, as it is": self.kept,
            "bound anew, arrays known to ONNX Runtime": lambda: self._run(self.bind(self._values)),
            "bound anew, arrays too": lambda: self._run(self.bind(self.wrapped())),
            "fed as arrays": lambda: self._session.run([graph.RESULT], self._caches | self._small),
            "fed as arrays, all outputs fetched": lambda: self._session.run(None, self._caches | self._small),
        }

    def preparations(self) -> dict[str, Step]:
        """What of them is not the step itself."""
        return {
            "kept bindings, as it is": self._prepare,
            "bound anew, arrays known to ONNX Runtime": lambda: self.bind(self._values),
            "bound anew, arrays too": lambda: self.bind(self.wrapped()),
        }

    def kept(self) -> Any:
        return self._stage.run([Piece(0, self._past, 1, wants_logits=True)], self._one)

    def _prepare_kept(self, inside: Any) -> None:
        binding = inside._binding(0, 1)  # noqa: SLF001
        binding.set_step(self._past + 1, [self._past])
        binding.set_values(1, self._one, self._row)

    def wrapped(self) -> dict[str, Any]:
        found = {name: shared(array) for name, array in (self._caches | self._small).items()}
        return found | {graph.RESULT: shared(self._result)}

    def bind(self, values: dict[str, Any]) -> Any:
        binding = self._session.io_binding()
        for name in self._small:
            binding.bind_ortvalue_input(name, values[name])
        for name in self._part.caches:
            binding.bind_ortvalue_input(name, values[name])
            binding.bind_ortvalue_output(attention.updated(name), values[name])
        binding.bind_ortvalue_output(graph.RESULT, values[graph.RESULT])
        return binding

    def _run(self, binding: Any) -> None:
        self._session.run_with_iobinding(binding)


def binding(options: argparse.Namespace) -> Table:
    table = Table("context", "way", "a step (us)", "of it preparing (us)", "share")
    for context in options.contexts:
        decoding = Decoding(options.model, options.threads, context, options.past)
        steps = in_turn(decoding.ways(), options.rounds, 0.15)
        prepared = in_turn(decoding.preparations(), options.rounds, 0.02)
        for way, taken in steps.items():
            own = [f"{prepared[way]:.0f}", f"{prepared[way] / taken:.2%}"] if way in prepared else []
            table.add_row(str(context), way, f"{taken:.0f}", *own)
    return table


# ---- products ----

SHAPES: Final = {  # columns (what is read of each token), rows (what is computed)
    "small": ((576, 576), (576, 1536), (1536, 576), (576, 49152)),
    "large": ((2048, 2048), (2048, 8192), (8192, 2048)),
}
BLOCKS: Final = (16, 32, 64, 128)
COLD_BYTES: Final = 8 << 20  # of matrices that are used in turn, so that they come from beyond a core's own cache


class Form:
    """One way to hold a matrix."""

    def __init__(self, bits: int, block: int, level: int, *, has_zeros: bool) -> None:
        self.bits, self.block, self.level, self.has_zeros = bits, block, level, has_zeros

    def arrays(self, columns: int, rows: int) -> dict[str, np.ndarray]:
        blocks = -(-columns // self.block)
        found = {
            "codes": RANDOM.integers(0, 256, (rows, blocks, self.block * self.bits // 8), np.uint8),
            "scales": RANDOM.random(rows * blocks, np.float32),
        }
        if self.has_zeros:
            found["zeros"] = RANDOM.integers(0, 256, (rows, -(-blocks * self.bits // 8)), np.uint8)
        return found


def product_step(form: Form, columns: int, rows: int, tokens: int, threads: int) -> tuple[Step, int, int]:
    """All products of one graph with matrices of their own; how many there are, and the bytes of each matrix."""
    size = sum(array.nbytes for array in form.arrays(columns, 16).values()) * rows // 16
    count = max(1, min(24, COLD_BYTES // size))
    builder = GraphBuilder()
    builder.input("source", np.float32, ["tokens", columns])
    for index in range(count):
        names = [builder.constant(f"{name}.{index}", value) for name, value in form.arrays(columns, rows).items()]
        builder.node(
            "MatMulNBits", ["source", *names], f"result.{index}", MICROSOFT,
            N=rows, K=columns, bits=form.bits, block_size=form.block, accuracy_level=form.level,
        )  # fmt: skip
        builder.output(f"result.{index}", np.float32, ["tokens", rows])
    feed = {"source": RANDOM.standard_normal((tokens, columns), np.float32)}
    places = {f"result.{index}": np.empty((tokens, rows), np.float32) for index in range(count)}
    return bound(builder, feed, places, threads), count, size


def bound(builder: GraphBuilder, inputs: dict[str, Any], outputs: dict[str, Any], threads: int) -> Step:
    """A run of the graph over these arrays, after one that was not counted."""
    options = new_options(threads)
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US_MAX))
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or other sessions' threads take the cores
    session = open_session(builder.model(), options, builder.weights)
    binding = session.io_binding()
    values = {id(array): shared(array) for array in (*inputs.values(), *outputs.values())}
    for name, array in inputs.items():
        binding.bind_ortvalue_input(name, values[id(array)])
    for name, array in outputs.items():
        binding.bind_ortvalue_output(name, values[id(array)])
    session.run_with_iobinding(binding)
    return functools.partial(session.run_with_iobinding, binding)


def forms(options: argparse.Namespace) -> Iterator[Form]:
    for bits, block, level, zeros in product(options.bits, options.blocks, options.levels, options.zeros):
        yield Form(bits, block, level, has_zeros=zeros == "with")


def title(form: Form) -> str:
    return f"{form.bits} bits, level {form.level}" + (", zeros" if form.has_zeros else "")


def products_table(options: argparse.Namespace) -> Table:
    columns = (f"blocks of {block}: us, GB/s, G operations/s" for block in options.blocks)
    table = Table("matrix, tokens", "form", *columns)
    shapes = [shape for name in options.shapes for shape in SHAPES[name]]
    for (width, height), tokens in product(shapes, options.rows):
        steps, sizes = {}, {}
        for form in forms(options):
            step, count, size = product_step(form, width, height, tokens, options.threads)
            steps[form], sizes[form] = step, (count, size)
        found = in_turn(steps, options.rounds, options.seconds)
        cells: dict[str, list[str]] = {}
        for form, (count, size) in sizes.items():
            taken = found[form] / count
            rates = f"{taken:.0f}, {size / taken / 1e3:.1f}, {2e-3 * width * height * tokens / taken:.0f}"
            cells.setdefault(title(form), []).append(rates)
        for name, row in cells.items():
            table.add_row(f"{width} to {height}, {tokens}", name, *row)
    return table


# ---- levels ----


def levels(options: argparse.Namespace) -> Table:
    """Of the whole model, in exact mode with another `accuracy_level` in all products, and as it is (4)."""
    tokens = tokens_of(options.model, TEXT.read_text(), options.tokens)

    def logits(level: int) -> np.ndarray:
        with patch.object(products, "FLOAT_ACCUMULATION", level):
            stage = load(spec_of(options.model, options.threads, options.tokens, exact=level < 4))
        ways = [engine_logits(stage, tokens, 128), engine_logits(stage, tokens[:32], 1)]
        return np.concatenate(ways)

    table = Table("accuracy_level", "logits that differ from those of 0", "by at most")
    expected = logits(0)
    for level in (0, 1, 2, 3, 4):
        found = logits(level)
        apart = np.abs(found - expected)
        table.add_row(str(level), f"{(found != expected).mean():.2%} of {found.size:,}", f"{apart.max():.2g}")
    return table


# ---- attention ----

HEADS: Final = {"9/3 of 64": (9, 3), "32/8 of 64": (32, 8)}
HEAD: Final = 64
LAYERS: Final = 8  # in one graph, each with a cache of its own, as in a model
LARGEST: Final = 3**0.5  # of evenly spread values of the size of normal ones, which those in float32 are
QUERY_SIZE: Final = HEAD**-0.5  # far larger scores would leave weights so small that processors are slow with them
SCALES: Final = {"PER_CHANNEL": (-1, 1, HEAD), "PER_TENSOR": (1,)}
OLDER_KERNELS: Final = "ORT_GQA_DISABLE_FLASH_ATTENTION"


@contextmanager
def kernels(*, older: bool) -> Iterator[None]:
    """ONNX Runtime asks the environment when a session is made."""
    before = os.environ[OLDER_KERNELS]
    os.environ[OLDER_KERNELS] = str(int(older))
    try:
        yield
    finally:
        os.environ[OLDER_KERNELS] = before


def attention_step(heads: tuple[int, int], past: int, tokens: int, kind: str, threads: int) -> Step:
    """All layers, whose cache of `kind` holds `past` tokens before. With one of float16 all that goes in and comes out
    is float16, as in the engine: beside queries in float32 the whole cache would be converted there and back.
    """
    query_heads, kv_heads = heads
    builder, total = GraphBuilder(), past + tokens
    floats = np.float16 if kind == "float16" else np.float32
    add_tables(builder, total, floats)
    attributes = quantised(builder, kv_heads, kind) | {"num_heads": query_heads, "kv_num_heads": kv_heads}
    inputs: dict[str, Any] = {
        "joined": (
            RANDOM.standard_normal((1, tokens, (query_heads + 2 * kv_heads) * HEAD), np.float32) * QUERY_SIZE
        ).astype(floats),
        "ends": np.array([total - 1], np.int32),
        "longest": np.array([total], np.int32),
    }
    outputs: dict[str, Any] = {}
    for layer in range(LAYERS):
        caches = [f"{layer}.keys", f"{layer}.values"]
        for name in caches:
            inputs[name] = outputs[f"{name}.new"] = random_cache(kv_heads, total, kind)
        outputs[f"{layer}.result"] = np.empty((1, tokens, query_heads * HEAD), floats)
        names = ["joined", "", "", *caches, "ends", "longest", "cosines", "sines"]
        names += ["", "", "", "scale", "scale"] if "kv_cache_bit_width" in attributes else []
        results = [f"{layer}.result", *(f"{name}.new" for name in caches)]
        builder.nodes_with("GroupQueryAttention", names, results, MICROSOFT, scale=1.0, do_rotary=1, **attributes)
    for arrays, add in ((inputs, builder.input), (outputs, builder.output)):
        for name, value in arrays.items():
            add(name, value.dtype, list(value.shape))
    return bound(builder, inputs, outputs, threads)


def add_tables(builder: GraphBuilder, total: int, floats: type[np.floating]) -> None:
    """Cosines and sines of all positions."""
    angles = np.outer(np.arange(total), 10000.0 ** (-np.arange(0, HEAD, 2) / HEAD))
    builder.constant("cosines", np.cos(angles).astype(floats))
    builder.constant("sines", np.sin(angles).astype(floats))


def quantised(builder: GraphBuilder, kv_heads: int, kind: str) -> dict[str, Any]:
    """What the operator is told of a cache of whole numbers, and its scales as a constant."""
    if kind.startswith("float"):
        return {}
    bits, grain = (4, "PER_CHANNEL") if kind == "4 bits" else (8, kind)
    shape = tuple(kv_heads if size == -1 else size for size in SCALES[grain])
    builder.constant("scale", np.full(shape, LARGEST / ((1 << (bits - 1)) - 1), np.float32))
    return {"k_quant_type": grain, "v_quant_type": grain, "kv_cache_bit_width": bits}


def random_cache(kv_heads: int, total: int, kind: str) -> np.ndarray:
    if kind.startswith("float"):
        return RANDOM.standard_normal((1, kv_heads, total, HEAD), np.float32).astype(kind)
    if kind == "4 bits":
        return RANDOM.integers(0, 256, (1, kv_heads, total, HEAD // 2), np.uint8)
    return RANDOM.integers(-127, 128, (1, kv_heads, total, HEAD), np.int8)


def attention_table(options: argparse.Namespace) -> Table:
    """A layer's time: of the cache in float32, and how much faster than that others are."""
    ways = [way for way in WAYS if way == WAYS[0] or way[0] in options.kinds]
    table = Table("heads", "tokens", "past", "float32, as it is (us)", *(f"{k}, {o}" for k, o in ways[1:]))
    for (name, heads), tokens, past in product(HEADS.items(), options.chunks, options.pasts):
        steps: dict[Any, Step] = {}
        for kind, which in ways:
            with kernels(older=which == "as it is"):
                steps[kind, which] = attention_step(heads, past, tokens, kind, options.threads)
        found = {way: taken / LAYERS for way, taken in in_turn(steps, options.rounds, options.seconds).items()}
        own = found[WAYS[0]]
        others = (f"{found[way]:.0f} ({own / found[way]:.2f})" for way in ways[1:])
        table.add_row(name, str(tokens), str(past), f"{own:.0f}", *others)
    return table


WAYS: Final = (
    ("float32", "as it is"),
    ("float32", "newer"),
    ("PER_CHANNEL", "as it is"),
    ("PER_CHANNEL", "newer"),
    ("PER_TENSOR", "as it is"),
    ("4 bits", "as it is"),
    ("4 bits", "newer"),
    ("float16", "as it is"),
    ("float16", "newer"),
)
KINDS: Final = tuple(dict.fromkeys(kind for kind, _ in WAYS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.02, help="of each way in a round")
    asked = parser.add_subparsers(required=True)
    one = asked.add_parser("binding")
    one.add_argument("model", type=Path)
    one.add_argument("--contexts", type=int, nargs="+", default=[512, 2048])
    one.add_argument("--past", type=int, default=320)
    one.set_defaults(table=binding)
    one = asked.add_parser("products")
    one.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    one.add_argument("--rows", type=int, nargs="+", default=[1, 128], help="tokens that are computed together")
    one.add_argument("--bits", type=int, nargs="+", default=[4, 8])
    one.add_argument("--blocks", type=int, nargs="+", default=BLOCKS)
    one.add_argument("--levels", type=int, nargs="+", default=[0, 4], help="accuracy_level")
    one.add_argument("--zeros", nargs="+", choices=("without", "with"), default=["without"])
    one.set_defaults(table=products_table)
    one = asked.add_parser("levels")
    one.add_argument("model", type=Path)
    one.add_argument("--tokens", type=int, default=200)
    one.set_defaults(table=levels)
    one = asked.add_parser("attention")
    one.add_argument("--pasts", type=int, nargs="+", default=[320, 1000, 4000])
    one.add_argument("--chunks", type=int, nargs="+", default=[1, 128], help="tokens of a step")
    one.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="types of cache beside float32")
    one.set_defaults(table=attention_table)
    options = parser.parse_args()
    Console(width=170).print(options.table(options))


if __name__ == "__main__":
    main()
