"""One stage of a Llama model on ONNX Runtime."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from covey.checkpoints.gguf_file import read_header
from covey.engine.contract import Activations, EngineError, LoadProgress, Logits, Piece
from covey.engine.onnx.graph import LlamaGraph, StageGraph
from covey.engine.onnx.session import KvCache, StageSession, give_back_memory
from covey.engine.onnx.settings import LlamaSettings, read_settings, rotary_tables
from covey.engine.onnx.weights import HeadWeights, StageFile, Table, row_count
from covey.schema.runner import RunnerSpec

WARM_UP_TOKENS: Final = 16
EXACT: Final = "exact"  # the engine option: "1" leaves activations as they are


class OnnxStage:
    """Implements `StageEngine`."""

    def __init__(self, spec: RunnerSpec) -> None:
        self._spec = spec
        self._is_last = spec.shard.layer_end == spec.shard.layer_count
        self._hidden_size = 0
        self._result_size = 0  # of the vocabulary on the last stage, else the hidden size
        self._vocabulary_size: int | None = None  # on the first stage
        self._session: StageSession | None = None
        self._lengths = [0] * spec.slot_count  # tokens that each slot has in the cache

    def load(self, progress: Callable[[LoadProgress], None]) -> None:
        self._open(progress)
        give_back_memory()  # what reading and packing used, about as much as the weights

    def warm_up(self) -> None:
        prompt = min(WARM_UP_TOKENS, self._spec.context_length - 1)
        self.run([Piece(0, 0, prompt, wants_logits=False)], self._blank(prompt))
        self.run([Piece(0, prompt, 1, wants_logits=True)], self._blank(1))
        self._lengths = [0] * self._spec.slot_count

    def run(self, pieces: Sequence[Piece], values: Activations) -> Activations | Logits:
        self._check(pieces, values)
        groups = neighbours(pieces)
        together = groups == [list(range(len(pieces)))]
        result = self._run_group(pieces, values) if together else self._run_groups(pieces, groups, values)
        for piece in pieces:
            self._lengths[piece.slot] = piece.position + piece.token_count
        if not self._is_last or all(piece.wants_logits for piece in pieces):
            return result
        return result[[index for index, piece in enumerate(pieces) if piece.wants_logits]]

    def _open(self, progress: Callable[[LoadProgress], None]) -> None:
        header = read_header(self._spec.model_path)
        settings = read_settings(header)
        if settings.layer_count != self._spec.shard.layer_count:
            expected = self._spec.shard.layer_count
            raise EngineError(f"the model file has {settings.layer_count} layers, not {expected}; place it again")
        with Path(self._spec.model_path).open("rb", buffering=0) as opened:
            file = StageFile(opened, header, settings, self._spec.shard)
            table, head = file.read_ends()
            built = self._build(file, settings, table, head, progress)
        self._vocabulary_size = None if table is None else row_count(table)
        self._hidden_size = settings.hidden_size
        self._result_size = settings.hidden_size if head is None else head.vocabulary_size
        cache_shape = (self._spec.slot_count, settings.kv_head_count, self._spec.context_length, settings.head_size)
        self._session = StageSession(
            built,
            KvCache(built.caches, cache_shape),
            thread_count=self._spec.thread_count,
            result_size=self._result_size,
        )

    def _build(
        self,
        file: StageFile,
        settings: LlamaSettings,
        table: Table | None,
        head: HeadWeights | None,
        progress: Callable[[LoadProgress], None],
    ) -> StageGraph:
        shard = self._spec.shard
        rotary = rotary_tables(settings, self._spec.context_length, file.read_rope_divisors())
        llama = LlamaGraph(settings, rotary, table, is_exact=self._spec.engine_options.get(EXACT) == "1")
        total = shard.layer_end - shard.layer_start
        progress(LoadProgress(0, total, file.bytes_read, file.bytes_total))  # the ends may be as large as many layers
        for layer in range(shard.layer_start, shard.layer_end):
            llama.add_layer(layer, file.read_layer(layer))
            progress(LoadProgress(layer + 1 - shard.layer_start, total, file.bytes_read, file.bytes_total))
        return llama.finish(head)

    def _run_groups(self, pieces: Sequence[Piece], groups: list[list[int]], values: Activations) -> NDArray[np.float32]:
        """Each group by itself, and the results in the order of `pieces`."""
        token_starts = [0, *accumulate(piece.token_count for piece in pieces)]
        result_starts = range(len(pieces) + 1) if self._is_last else token_starts
        results = np.empty((result_starts[-1], self._result_size), np.float32)
        for group in groups:
            rows = np.concatenate([values[token_starts[index] : token_starts[index + 1]] for index in group])
            done = self._run_group([pieces[index] for index in group], rows)
            ends = [0, *accumulate(result_starts[index + 1] - result_starts[index] for index in group)]
            for index, start, end in zip(group, ends, ends[1:], strict=False):
                results[result_starts[index] : result_starts[index + 1]] = done[start:end]
        return results

    def _run_group(self, pieces: Sequence[Piece], values: Activations) -> NDArray[np.float32]:
        """Pieces of equal length in neighbouring slots, in this order; their activations, or each last token's logits.

        The result is good until the next run.
        """
        if self._session is None:
            raise EngineError("the stage was asked to run before it was loaded")
        token_count = pieces[0].token_count
        wanted = np.arange(token_count - 1, len(values), token_count) if self._is_last else None
        return self._session.run(pieces[0].slot, [piece.position for piece in pieces], values, wanted)

    def _blank(self, token_count: int) -> Activations:
        if self._vocabulary_size is not None:
            return np.zeros(token_count, np.int64)
        return np.zeros((token_count, self._hidden_size), np.float32)

    def _check(self, pieces: Sequence[Piece], values: Activations) -> None:
        """A step that would read what was never written is our mistake somewhere; it must not become an answer."""
        if len(values) != sum(piece.token_count for piece in pieces):
            raise EngineError(f"a step of {sum(piece.token_count for piece in pieces)} tokens came with {len(values)}")
        if len({piece.slot for piece in pieces}) < len(pieces):
            raise EngineError("a step names one slot twice")
        for piece in pieces:
            self._check_piece(piece)
        if self._vocabulary_size is not None and not 0 <= values.min() <= values.max() < self._vocabulary_size:
            raise EngineError(f"a token id is outside of the vocabulary of {self._vocabulary_size}")

    def _check_piece(self, piece: Piece) -> None:
        if not 0 <= piece.slot < self._spec.slot_count or piece.token_count < 1:
            raise EngineError(f"a step names slot {piece.slot} with {piece.token_count} tokens; it can't be run")
        if not 0 <= piece.position <= self._lengths[piece.slot]:
            raise EngineError(
                f"slot {piece.slot} holds {self._lengths[piece.slot]} tokens; {piece.position} leaves a gap"
            )
        if piece.position + piece.token_count > self._spec.context_length:
            raise EngineError(f"slot {piece.slot} is full: it holds {self._spec.context_length} tokens")


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
