"""Consecutive layers of a model as one ONNX graph with its KV cache: what a stage is made of.

A stage that takes on layers of a lost neighbour gets them as another segment, and its weights stay where they are.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from covey.checkpoints.checkpoint import Checkpoint, TensorReader
from covey.checkpoints.opening import open_checkpoint, weight_files
from covey.checkpoints.quantizing import BITS
from covey.engine.contract import Activations, EngineError, Exchange
from covey.engine.onnx import kernel_file
from covey.engine.onnx.architecture import Architecture
from covey.engine.onnx.graph import ModelGraph, StageGraph
from covey.engine.onnx.portions import portions
from covey.engine.onnx.rotary import FloatType
from covey.engine.onnx.session import KvCache, StageSession
from covey.engine.onnx.settings import read_settings
from covey.engine.onnx.weights import HeadWeights, StageFile, Table, row_count
from covey.schema.model import KvCacheType, Quantizing, Shard
from covey.schema.runner import RunnerSpec

EXACT: Final = ("exact", "1")  # the engine option that leaves activations as they are
QUANTIZE: Final = "quantize"  # the one whose value says what matrices in full precision are rounded to
KV_CACHE: Final = "kv_cache"  # the one whose value says what keys and values are kept as; float32 where it is not there
FLOAT_TYPES: Final[dict[KvCacheType, FloatType]] = {KvCacheType.F32: np.float32, KvCacheType.F16: np.float16}

Told = Callable[[int, int, int], None]  # layers read of this segment, and bytes read of how many


class Footing(Struct, frozen=True):
    """What the segments of one stage have in common. Where it changes, none can be kept."""

    model_path: str
    file_mark: tuple[int, ...]  # which files those were
    context_length: int
    slot_count: int
    thread_count: int
    options: tuple[tuple[str, str], ...]
    rank: int
    rank_count: int


class Model(Struct, frozen=True):
    """A model file that can be read from."""

    footing: Footing
    header: Checkpoint
    architecture: Architecture

    def portions(self, shard: Shard) -> list[Shard]:
        """The layers that become one graph each, in the order in which they are to be loaded."""
        packs_itself = EXACT in self.footing.options or not kernel_file.is_usable()
        return portions(self.header, self.architecture, shard, packs_itself=packs_itself)


class Segment:
    """A loaded range of layers; with the first layer comes the embedding, with the last one the output."""

    def __init__(
        self, shard: Shard, session: StageSession, *, hidden_size: int, vocabulary_size: int | None, result_size: int
    ) -> None:
        self.shard = shard
        self.hidden_size = hidden_size
        self.vocabulary_size = vocabulary_size  # of the embedding; None where there is none
        self.result_size = result_size  # of the vocabulary with the output, else the hidden size
        self._session = session

    def run(
        self, slot: int, positions: list[int], values: Activations, row_count: int | None, exchange: Exchange
    ) -> NDArray[np.float32]:
        """Sequences of equal length in neighbouring slots; their activations, or the logits of each one's last
        `row_count` tokens, which are none at ranks above 0. The result is good until the next run.
        """
        if row_count is None:
            return self._session.run(slot, positions, values, None, exchange)
        tokens = np.arange(len(values)).reshape(len(positions), -1)
        rows = tokens[:, -row_count:].reshape(-1)
        logits = exchange.join(self._session.run(slot, positions, values, rows, exchange))
        if logits is None:
            return np.empty((0, self.result_size), np.float32)
        if logits.shape[1] != self.result_size:
            raise EngineError(f"the ranks computed {logits.shape[1]} logits together, not {self.result_size}")
        return logits

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Keys and values of the tokens from `start` to `end`, from one slot to another."""
        self._session.copy(source, target, start, end)


def open_model(spec: RunnerSpec) -> Model:
    """Raises `EngineError`, `CheckpointError`."""
    with reading(spec.model_path):
        header, footing = open_checkpoint(spec.model_path), _footing(spec)
    architecture = read_settings(header)
    if architecture.layer_count != spec.shard.layer_count:
        expected = spec.shard.layer_count
        raise EngineError(f"the model file has {architecture.layer_count} layers, not {expected}; place it again")
    return Model(footing, header, architecture)


def load(model: Model, shard: Shard, told: Told) -> Segment:
    """Raises `EngineError`, `CheckpointError`."""
    footing = model.footing
    with kernel_file.opened() as file:
        built, ends = _build(model, shard, told, file)
        own = ends.architecture
        cache = KvCache(
            tuple(name for part in built for name in part.caches),
            (footing.slot_count, own.kv_head_count, footing.context_length, own.head_size),
            _cache_type(footing),
        )
        session = StageSession(
            built,
            cache,
            file,
            thread_count=footing.thread_count,
            hidden_size=own.hidden_size,
            result_size=own.hidden_size if ends.head is None else ends.head.own_size,
        )
    return Segment(
        shard,
        session,
        hidden_size=own.hidden_size,
        vocabulary_size=None if ends.table is None else row_count(ends.table),
        result_size=own.hidden_size if ends.head is None else ends.head.vocabulary_size,
    )


class _Ends(Struct, frozen=True):
    architecture: Architecture  # with the heads of this rank
    table: Table | None
    head: HeadWeights | None


def _build(
    model: Model, shard: Shard, told: Told, kernels: kernel_file.KernelFile | None
) -> tuple[tuple[StageGraph, ...], _Ends]:
    footing = model.footing
    with reading(footing.model_path), TensorReader(footing.model_path) as reader:
        file = StageFile(
            reader, model.header, model.architecture, shard, footing.context_length, _bits(footing),
            rank=footing.rank, rank_count=footing.rank_count,
        )  # fmt: skip
        ends = _Ends(file.share.architecture, *file.read_ends())
        graph = ModelGraph(
            ends.architecture,
            file.read_rotary_tables(_cache_type(footing)),
            ends.table,
            kernels,
            is_exact=EXACT in footing.options,
            is_split=footing.rank_count > 1,
            cache_type=_cache_type(footing),
        )
        told(0, file.bytes_read, file.bytes_total)  # the ends may be as large as many layers
        for layer in range(shard.layer_start, shard.layer_end):
            graph.add_layer(layer, file.read_layer(layer))
            told(layer + 1 - shard.layer_start, file.bytes_read, file.bytes_total)
    return graph.finish(ends.head), ends


def _bits(footing: Footing) -> int | None:
    asked = dict(footing.options).get(QUANTIZE)
    return None if asked is None else BITS[Quantizing(asked)]


def _cache_type(footing: Footing) -> FloatType:
    return FLOAT_TYPES[KvCacheType(dict(footing.options).get(KV_CACHE, KvCacheType.F32))]


@contextmanager
def reading(path: str) -> Generator[None]:
    """What the system has against the file, in a sentence. Raises `EngineError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise EngineError(
            f"the model file {error.filename or path} is gone; put it back, then place the model again"
        ) from None
    except OSError as error:
        reason = error.strerror or error
        raise EngineError(
            f"the model file {path} can't be read ({reason}); see to that, then place the model again"
        ) from None


def _footing(spec: RunnerSpec) -> Footing:
    found = [file.stat() for file in weight_files(spec.model_path)]
    return Footing(
        model_path=spec.model_path,
        file_mark=tuple(mark for each in found for mark in (each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns)),
        context_length=spec.context_length,
        slot_count=spec.slot_count,
        thread_count=spec.thread_count,
        options=tuple(sorted(spec.engine_options.items())),
        rank=spec.rank,
        rank_count=spec.rank_count,
    )
