"""A draft model: a small one beside the head's stage, whole and with one slot, that guesses what the large one says.

It reads and computes with the same engine as the stage. What its slot holds of a text is not read again, and what it
guessed wrong is dropped by going on at an earlier position. Where tokens are drawn it draws with the same noise, which
is that of seed, position and token: so it likely draws what the model draws. Penalties are left to the model. When to
ask it is decided elsewhere (`drafting`).
"""

import logging
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from covey.checkpoints.checkpoint import CheckpointError
from covey.engine.contract import ALONE, EngineError, LoadProgress, Piece, StageEngine
from covey.engine.cores import Cores
from covey.engine.drafting import Drafted
from covey.engine.engines import create
from covey.engine.sampling import pick
from covey.engine.slots import Tokens, shared_length
from covey.schema.generation import PREFILL_CHUNK_TOKENS, Sampling
from covey.schema.model import Shard
from covey.schema.runner import Draft, RunnerSpec

# The engine options that say what the model is. The others say how the stage computes: exact or not, the draft's words
# are guesses.
SHARED_OPTIONS: Final = frozenset({"quantize", "kv_cache", "vocabulary_size", "hidden_size"})
LEFT_TO_READ: Final = 2  # tokens, with which the first guess takes hardly longer than with one

log = logging.getLogger(__name__)
Progress = Callable[[LoadProgress], None]


class DraftModel:
    """Implements `Drafter`. One thread uses it; another one looks whether it is running."""

    def __init__(self, spec: RunnerSpec, draft: Draft, cores: Cores, engine: StageEngine | None = None) -> None:
        """Not loaded yet. `engine`: the one that `spec` names, if none is given. Raises `EngineError`."""
        self.is_running = False
        self._draft = draft
        self._cores = cores
        self._beside = _beside(spec)
        self._engine = engine or create(spec)
        self._known = 0  # so many token ids, from 0 on, mean the same to both models; 0: all
        self._is_compared = False
        self._has_failed = False
        self._held: Tokens = np.empty(0, np.int64)  # the tokens whose keys and values the slot has

    def serves(self, spec: RunnerSpec) -> bool:
        """Whether it is the draft of `spec`, whatever it is still to load for that."""
        return spec.draft == self._draft and _beside(spec) == self._beside

    def compare(self, spec: RunnerSpec) -> None:
        """Before anything is loaded: what can't be a draft costs no reading of the model. Raises `EngineError`."""
        if not self._is_compared:
            with self._named():
                self._known = self._shared_count(spec)
            self._is_compared = True

    def load(self, spec: RunnerSpec, progress: Progress) -> None:
        """As an engine's, for each generation. Raises `EngineError`."""
        self.compare(spec)
        with self._named():
            self._engine.load(_own(spec, self._draft), progress, ALONE)
        self._held, self._has_failed = self._held[:0], False

    def warm_up(self) -> None:
        self._engine.warm_up()

    def guess(self, tokens: Sequence[int], most: int, sampling: Sampling) -> Drafted:
        """Nothing any more once its engine has failed: the model can do without it, until it is loaded again."""
        if self._has_failed:
            return Drafted((), 0.0, 0.0)
        try:
            return self._read_and_guess(tokens, most, sampling)
        except EngineError as error:
            log.warning("the draft model failed, so nothing is drafted from here on: %s", error)
            self._has_failed = True
            return Drafted((), 0.0, 0.0)

    def _read_and_guess(self, tokens: Sequence[int], most: int, sampling: Sampling) -> Drafted:
        """Raises `EngineError`."""
        began_s = time.monotonic()
        wanted = self._readable(tokens)
        held = min(shared_length(self._held, wanted), wanted.size - 1)
        self._held = wanted[:held]
        if wanted.size - held > LEFT_TO_READ:
            self._run(wanted[held : min(wanted.size - 1, held + PREFILL_CHUNK_TOKENS)])
        read_s = time.monotonic()
        has_read = wanted.size - self._held.size <= LEFT_TO_READ
        guesses = self._guess(wanted[self._held.size :], most, sampling) if has_read else ()
        return Drafted(guesses, read_s - began_s, time.monotonic() - read_s)

    def _guess(self, unread: Tokens, most: int, sampling: Sampling) -> tuple[int, ...]:
        """Logits by which nothing can be picked end it: the model's own may do."""
        guesses: list[int] = []
        while len(guesses) < most:
            logits = self._run(unread, wants_logits=True)[-1]
            try:
                guesses.append(pick(logits[: self._known or None], sampling, self._held.size))
            except EngineError:
                break
            unread = np.array(guesses[-1:], np.int64)
        return tuple(guesses)

    def _run(self, tokens: Tokens, *, wants_logits: bool = False) -> NDArray[np.float32]:
        """The logits of the last one are good until the next run."""
        piece = Piece(0, self._held.size, tokens.size, wants_logits=wants_logits)
        self.is_running = True
        try:
            with self._cores.computing():
                logits = self._engine.run([piece], tokens)
        finally:
            self.is_running = False
        self._held = np.concatenate([self._held, tokens])
        return logits

    def _readable(self, tokens: Sequence[int]) -> Tokens:
        """One that the draft does not know stands as another one: it guesses a little worse after that."""
        wanted = np.asarray(tokens, np.int64)
        return np.where(wanted < self._known, wanted, 0) if self._known else wanted

    @contextmanager
    def _named(self) -> Generator[None]:
        """Raises `EngineError` that says it is the draft's."""
        try:
            yield
        except (EngineError, CheckpointError) as error:
            raise EngineError(f"the draft model {Path(self._draft.model_path).name}: {error}") from None

    def _shared_count(self, spec: RunnerSpec) -> int:
        """How many ids mean the same to both; 0: all. Raises `EngineError` where one means something else."""
        ours, theirs = (self._engine.token_texts(path) for path in (spec.model_path, self._draft.model_path))
        for token_id, (our, their) in enumerate(zip(ours, theirs, strict=False)):
            if our and their and our != their:
                raise EngineError(
                    f"its token {token_id} is {their!r}, the model's is {our!r}; choose a draft of the same family"
                )
        sizes = (spec.vocabulary_size, self._draft.vocabulary_size, len(ours), len(theirs))
        return min(filter(None, sizes), default=0)


def _beside(spec: RunnerSpec) -> tuple[str, str, int]:
    """What it was compared with."""
    return spec.engine, spec.model_path, spec.vocabulary_size


def _own(spec: RunnerSpec, draft: Draft) -> RunnerSpec:
    """What its engine is to load."""
    return replace(
        spec,
        engine_options={key: value for key, value in spec.engine_options.items() if key in SHARED_OPTIONS},
        model_path=draft.model_path,
        shard=Shard(0, draft.layer_count, draft.layer_count),
        stage_index=0,
        stage_count=1,
        stage_node_ids=(),
        slot_count=1,
        rank=0,
        rank_count=1,
        rank_node_ids=(),
        draft=None,
    )
