"""A tiny engine without a model, for tests of all above it: its answers depend on every token of the slot so far.

Each layer keeps a 32-bit hash per position, made of the layer before and its own hash one position earlier, as a
layer of a model attends to its cache. The hash travels between stages in the first lanes of the activations. So a
wrong slot, a lost chunk or one that comes twice changes the answer, or is refused; the number of stages does not.

Where ranks share a layer, each has a part of every lane's number, and only the sum of all is the hash; of the logits
each has some columns. So a lost sum, or one of another step, changes the answer, and the number of ranks does not.

`engine_options`: `vocabulary_size`, `hidden_size`, `step_delay_ms` (each step takes at least so long),
`load_delay_ms` (so does each layer's load), and `lookup`, which is the head's. `exact` it is anyway, and there is
nothing to `quantize`, nor a `kv_cache` of floats.
"""

import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Final

import numpy as np

from covey.engine.contract import Activations, EngineError, Exchange, LoadProgress, Logits, Piece
from covey.schema.runner import RunnerSpec

WORD: Final = 0xFFFFFFFF
LANES: Final = 4  # of a byte each, which every float type holds exactly
DEFAULTS: Final = {
    "vocabulary_size": 256,
    "hidden_size": 8,
    "step_delay_ms": 0,
    "load_delay_ms": 0,
    "lookup": 1,
}
IGNORED: Final = ("exact", "quantize", "kv_cache")
LOGITS_SPAN: Final = 8.0  # of the best to the worst: a distribution with a clear best and a long tail
LAYER_BYTES: Final = 4


class FakeStage:
    def __init__(self) -> None:
        self._layers: dict[int, _Layer] = {}

    def token_texts(self, model_path: str) -> Sequence[str]:  # noqa: ARG002 - of any file, of which it reads none
        """Its ids stand for no text."""
        return ()

    def load(self, spec: RunnerSpec, progress: Callable[[LoadProgress], None], exchange: Exchange) -> None:
        self._exchange = exchange
        options = _options(spec.engine_options)
        self._spec = spec
        self._vocabulary_size = options["vocabulary_size"]
        self._hidden_size = max(options["hidden_size"], LANES)
        self._step_seconds = options["step_delay_ms"] / 1000
        self._is_first = spec.shard.layer_start == 0
        self._is_last = spec.shard.layer_end == spec.shard.layer_count
        self._vocabulary = np.arange(self._vocabulary_size, dtype=np.uint32) * np.uint32(0x9E3779B1)
        wanted = range(spec.shard.layer_start, spec.shard.layer_end)
        kept, self._layers = self._layers, {}
        for count, layer in enumerate(wanted, start=1):
            if layer not in kept:
                time.sleep(options["load_delay_ms"] / 1000)
            self._layers[layer] = _Layer(layer, spec.slot_count)
            progress(LoadProgress(count, len(wanted), count * LAYER_BYTES, len(wanted) * LAYER_BYTES))

    def warm_up(self) -> None:
        """There is nothing to warm, but the ranks meet here, as those of any engine do."""
        self._exchange.add_up(np.zeros((1, LANES), np.float32))

    def run(self, pieces: Sequence[Piece], values: Activations) -> Activations | Logits:
        if sum(piece.token_count for piece in pieces) != len(values):
            raise EngineError("The step's pieces and its numbers do not fit together.")
        if self._step_seconds:  # even a sleep of nothing gives the processor away
            time.sleep(self._step_seconds)
        for piece in pieces:
            self._check(piece)
        hashes = self._tokens(values) if self._is_first else _unpack(values)
        for layer in self._layers.values():
            hashes = self._sum(layer.run(pieces, hashes))
            layer.keep(pieces, hashes)
        return self._logits(pieces, hashes) if self._is_last else _pack(hashes, self._hidden_size)

    def _tokens(self, values: Activations) -> list[int]:
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < self._vocabulary_size:
            raise EngineError(f"A token id is outside the vocabulary of {self._vocabulary_size}.")
        return values.tolist()

    def _check(self, piece: Piece) -> None:
        if not 0 <= piece.slot < self._spec.slot_count:
            raise EngineError(f"Slot {piece.slot} does not exist.")
        if piece.position + piece.token_count > self._spec.context_length:
            raise EngineError(f"Slot {piece.slot} is full.")
        if piece.copy and not 0 <= piece.copy.source < self._spec.slot_count:
            raise EngineError(f"Slot {piece.copy.source} does not exist.")

    def _sum(self, hashes: list[int]) -> list[int]:
        """What the ranks' parts of it make together."""
        rank, count = self._exchange.rank, self._exchange.count
        if count == 1:
            return hashes
        lanes = np.array(hashes, "<u4").view(np.uint8).reshape(-1, LANES)
        part = (lanes // count + (rank < lanes % count)).astype(np.float32)
        self._exchange.add_up(part)
        return _unpack(part)

    def _logits(self, pieces: Sequence[Piece], hashes: list[int]) -> Logits:
        ends = accumulate(piece.token_count for piece in pieces)
        wanted = [each for piece, end in zip(pieces, ends, strict=True) for each in hashes[end - piece.row_count : end]]
        columns = np.array_split(self._vocabulary, self._exchange.count)[self._exchange.rank]
        words = columns + np.array(wanted, np.uint32)[:, None]
        words ^= words >> np.uint32(15)
        words *= np.uint32(0x85EBCA6B)
        words ^= words >> np.uint32(13)
        own = words.astype(np.float32) * np.float32(LOGITS_SPAN / 2**32)
        joined = self._exchange.join(own)
        return own[:0] if joined is None else joined


class _Layer:
    """One layer's cache: of each slot, the hash after each of its positions."""

    def __init__(self, number: int, slot_count: int) -> None:
        self._number = number
        self._slots: list[list[int]] = [[] for _ in range(slot_count)]

    def run(self, pieces: Sequence[Piece], hashes: list[int]) -> list[int]:
        """The hashes after this layer, of all pieces one after another. The slots forget what came at their places."""
        found: list[int] = []
        for piece in pieces:
            cache = self._slots[piece.slot]
            if piece.copy:
                cache[piece.copy.start :] = self._slots[piece.copy.source][piece.copy.start : piece.position]
            if piece.position > len(cache):
                held = f"Slot {piece.slot} holds {len(cache)} positions"
                raise EngineError(f"{held}; a step began at {piece.position}.")
            del cache[piece.position :]
            before = cache[-1] if cache else 0
            for value in hashes[len(found) : len(found) + piece.token_count]:
                before = ((before * 31 + value + self._number + 1) * 0x9E3779B1) & WORD
                before ^= before >> 15
                found.append(before)
        return found

    def keep(self, pieces: Sequence[Piece], hashes: list[int]) -> None:
        start = 0
        for piece in pieces:
            self._slots[piece.slot] += hashes[start : start + piece.token_count]
            start += piece.token_count


def _options(given: dict[str, str]) -> dict[str, int]:
    unknown = sorted(given.keys() - DEFAULTS.keys() - set(IGNORED))
    if unknown:
        raise EngineError(f"The fake engine has no option {unknown[0]}; it has {', '.join((*DEFAULTS, *IGNORED))}.")
    try:
        return DEFAULTS | {name: int(value) for name, value in given.items() if name in DEFAULTS}
    except ValueError as error:
        raise EngineError(f"An option of the fake engine is not a whole number: {error}.") from error


def _pack(hashes: list[int], hidden_size: int) -> Activations:
    values = np.zeros((len(hashes), hidden_size), np.float32)
    values[:, :LANES] = np.array(hashes, "<u4").view(np.uint8).reshape(-1, LANES)
    return values


def _unpack(values: Activations) -> list[int]:
    lanes = np.ascontiguousarray(values[:, :LANES]).astype(np.int64).astype(np.uint8)
    return lanes.view("<u4")[:, 0].tolist()
