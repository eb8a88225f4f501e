"""One stage of a model on ONNX Runtime."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Final

import numpy as np
from numpy.typing import NDArray

from covey.checkpoints.opening import open_checkpoint
from covey.engine.contract import Activations, Copy, EngineError, Exchange, LoadProgress, Logits, Piece
from covey.engine.onnx.segment import Footing, Model, Segment, load, open_model, reading
from covey.engine.onnx.session import give_back_memory
from covey.schema.model import Shard
from covey.schema.runner import RunnerSpec

WARM_UP_TOKENS: Final = 16


class OnnxStage:
    """Implements `StageEngine`. Its layers are in as many segments as were loaded one after another."""

    def __init__(self) -> None:
        self._footing: Footing | None = None
        self._segments: list[Segment] = []  # in order of layers

    def token_texts(self, model_path: str) -> Sequence[str]:
        from covey.checkpoints.tokenizer import token_texts  # noqa: PLC0415 - its library is large, and rarely used

        with reading(model_path):
            return token_texts(open_checkpoint(model_path))

    def load(self, spec: RunnerSpec, progress: Callable[[LoadProgress], None], exchange: Exchange) -> None:
        if (exchange.rank, exchange.count) != (spec.rank, spec.rank_count):
            raise EngineError(f"rank {spec.rank} of {spec.rank_count} was given the exchange of another")
        self._exchange = exchange
        self._segments = self._load(spec, progress)
        self._spec = spec
        self._is_last = spec.shard.layer_end == spec.shard.layer_count
        self._is_silent = self._is_last and exchange.rank > 0  # its logits are joined with those of rank 0, there
        self._lengths = [0] * spec.slot_count  # tokens that each slot has in the cache

    def warm_up(self) -> None:
        prompt = min(WARM_UP_TOKENS, self._spec.context_length - 1)
        self.run([Piece(0, 0, prompt, wants_logits=False)], self._blank(prompt))
        self.run([Piece(0, prompt, 1, wants_logits=True)], self._blank(1))
        self._lengths = [0] * self._spec.slot_count

    def run(self, pieces: Sequence[Piece], values: Activations) -> Activations | Logits:
        self._check(pieces, values)
        self._copy(pieces)
        groups = neighbours(pieces)
        together = groups == [list(range(len(pieces)))]
        result = self._run_group(pieces, values) if together else self._run_groups(pieces, groups, values)
        for piece in pieces:
            self._lengths[piece.slot] = piece.position + piece.token_count
        if self._is_silent:
            return result[:0]
        if not self._is_last or all(piece.wants_logits for piece in pieces):
            return result
        return result[[piece.wants_logits for piece in pieces for _ in range(_row_count(piece))]]

    def _load(self, spec: RunnerSpec, progress: Callable[[LoadProgress], None]) -> list[Segment]:
        model = open_model(spec)
        kept = [segment for segment in self._segments if _lies_within(segment.shard, spec.shard)]
        if model.footing != self._footing:
            kept = []
        self._segments, self._footing = kept, model.footing  # what is given up is gone before more is read
        return sorted(
            [*kept, *_load_missing(model, spec.shard, kept, progress)], key=lambda segment: segment.shard.layer_start
        )

    def _copy(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if copy := piece.copy:
                for segment in self._segments:
                    segment.copy(copy.source, piece.slot, copy.start, piece.position)

    def _run_groups(self, pieces: Sequence[Piece], groups: list[list[int]], values: Activations) -> NDArray[np.float32]:
        """Each group by itself, and the results in the order of `pieces`."""
        token_starts = [0, *accumulate(piece.token_count for piece in pieces)]
        result_starts = [0, *accumulate(map(_row_count, pieces))] if self._is_last else token_starts
        results = np.empty((result_starts[-1], self._segments[-1].result_size), np.float32)
        for group in groups:
            rows = np.concatenate([values[token_starts[index] : token_starts[index + 1]] for index in group])
            done = self._run_group([pieces[index] for index in group], rows)
            if self._is_silent:
                continue
            ends = [0, *accumulate(result_starts[index + 1] - result_starts[index] for index in group)]
            for index, start, end in zip(group, ends, ends[1:], strict=False):
                results[result_starts[index] : result_starts[index + 1]] = done[start:end]
        return results

    def _run_group(self, pieces: Sequence[Piece], values: Activations) -> NDArray[np.float32]:
        """Pieces of equal length in neighbouring slots, in this order; their activations, or each last token's logits.

        The result is good until the next run.
        """
        positions = [piece.position for piece in pieces]
        for segment in self._segments:
            has_logits = self._is_last and segment is self._segments[-1]
            row_count = _row_count(pieces[0]) if has_logits else None
            values = segment.run(pieces[0].slot, positions, values, row_count, self._exchange)
        return values

    def _blank(self, token_count: int) -> Activations:
        if self._segments[0].vocabulary_size is not None:
            return np.zeros(token_count, np.int64)
        return np.zeros((token_count, self._segments[0].hidden_size), np.float32)

    def _check(self, pieces: Sequence[Piece], values: Activations) -> None:
        """A step that would read what was never written is our mistake somewhere; it must not become an answer."""
        if not self._segments:
            raise EngineError("the stage was asked to run before it was loaded")
        if len(values) != sum(piece.token_count for piece in pieces):
            raise EngineError(f"a step of {sum(piece.token_count for piece in pieces)} tokens came with {len(values)}")
        if len({piece.slot for piece in pieces}) < len(pieces):
            raise EngineError("a step names one slot twice")
        for piece in pieces:
            self._check_piece(piece)
        vocabulary_size = self._segments[0].vocabulary_size
        if vocabulary_size is not None and not 0 <= values.min() <= values.max() < vocabulary_size:
            raise EngineError(f"a token id is outside of the vocabulary of {vocabulary_size}")

    def _check_piece(self, piece: Piece) -> None:
        if not 0 <= piece.slot < self._spec.slot_count or piece.token_count < 1:
            raise EngineError(f"a step names slot {piece.slot} with {piece.token_count} tokens; it can't be run")
        held = self._lengths[piece.slot] if piece.copy is None else self._held_with(piece.slot, piece.copy)
        if not 0 <= piece.position <= held:
            raise EngineError(f"slot {piece.slot} holds {held} tokens; {piece.position} leaves a gap")
        if piece.position + piece.token_count > self._spec.context_length:
            raise EngineError(f"slot {piece.slot} is full: it holds {self._spec.context_length} tokens")

    def _held_with(self, slot: int, copy: Copy) -> int:
        """How many tokens `slot` can have with what is copied to it."""
        if not 0 <= copy.source < self._spec.slot_count or copy.source == slot:
            raise EngineError(f"a step copies slot {copy.source} to slot {slot}; it can't be run")
        return self._lengths[copy.source] if 0 <= copy.start <= self._lengths[slot] else self._lengths[slot]


def _row_count(piece: Piece) -> int:
    """Rows of logits that are computed for it: one also where none is wanted."""
    return 1 + piece.guess_count


def _load_missing(
    model: Model, shard: Shard, kept: Sequence[Segment], progress: Callable[[LoadProgress], None]
) -> list[Segment]:
    """One segment or more for each gap that the kept ones leave. Progress counts all layers of the shard as one."""
    total = shard.layer_end - shard.layer_start
    done = sum(segment.shard.layer_end - segment.shard.layer_start for segment in kept)
    added: list[Segment] = []
    gaps = _gaps(shard, [segment.shard for segment in kept])
    for part in (portion for gap in gaps for portion in model.portions(gap)):

        def told(layers: int, bytes_read: int, bytes_total: int, before: int = done) -> None:
            progress(LoadProgress(before + layers, total, bytes_read, bytes_total))

        added.append(load(model, part, told))
        give_back_memory()  # what reading and packing used, about as much as the weights
        done += part.layer_end - part.layer_start
    return added


def _gaps(shard: Shard, kept: Sequence[Shard]) -> list[Shard]:
    """What of `shard` none of these ranges within it holds."""
    ends = [shard.layer_start, *(each.layer_end for each in sorted(kept, key=lambda each: each.layer_start))]
    starts = [*sorted(each.layer_start for each in kept), shard.layer_end]
    return [Shard(end, start, shard.layer_count) for end, start in zip(ends, starts, strict=True) if end < start]


def _lies_within(inner: Shard, outer: Shard) -> bool:
    return outer.layer_start <= inner.layer_start and inner.layer_end <= outer.layer_end


def neighbours(pieces: Sequence[Piece]) -> list[list[int]]:
    """Indices of pieces that run together: single tokens in adjacent slots share one reading of the weights."""
    groups: list[list[int]] = []
    for index in sorted(range(len(pieces)), key=lambda index: pieces[index].slot):
        before = pieces[groups[-1][-1]] if groups else None
        piece = pieces[index]
        if before is not None and piece.token_count == before.token_count == 1 and piece.slot == before.slot + 1:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
