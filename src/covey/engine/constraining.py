"""Which tokens may come next where an answer is held to a constraint: at the last stage, a mask for each row of logits.

A constraint is compiled while its prompt is computed; what then is not ready is not waited for: the step goes on
without it, and the head plans the same place again. Its tokens so far are read first, so an answer that was begun
elsewhere goes on as it would have. The first constraint of a process also reads the model's tokenizer.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from functools import cached_property, lru_cache, partial
from typing import Final

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from numpy.typing import NDArray

from covey.checkpoints.checkpoint import CheckpointError
from covey.checkpoints.opening import open_checkpoint
from covey.checkpoints.tokenizer import TextTokenizer, load_tokenizer
from covey.engine.grammar import (
    ConstraintError,
    Tokens,
    check_matcher,
    compile_constraint,
    deep_thread,
    refused,
    token_tree,
)
from covey.engine.plan import Remark
from covey.engine.sampling import Mask
from covey.schema.generation import Constraint

COMPILE_SECONDS_MAX: Final = 60.0  # with all that wait before it; the longest takes about one
LATE_SECONDS: Final = 0.02  # for which one step waits in all: longer, and the others' answers would falter
LATE: Final = Remark("The constraint of this answer is not ready yet; send the request again.", 503, is_late=True)
WORD_BITS: Final = 32
OUR_FAULT: Final = 500  # HTTP
BAD_REQUEST: Final = 400

log = logging.getLogger(__name__)


class Guide:
    """One request's constraint, and how far its answer has come."""

    def __init__(self, constraint: Constraint, compiling: "Future[LLMatcher]") -> None:
        self._constraint = constraint
        self._compiling = compiling
        self._deadline = time.monotonic() + COMPILE_SECONDS_MAX

    def is_ready(self, seconds: float) -> bool:
        """Within so many. Raises `ConstraintError` if it has not been for too long."""
        if self._compiling.done() or wait([self._compiling], seconds).done:
            return True
        if time.monotonic() > self._deadline:
            raise refused(self._constraint, f"it was not compiled within {COMPILE_SECONDS_MAX:.0f} s")
        return False

    def matcher(self) -> LLMatcher:
        """Once it is ready. Raises `ConstraintError`, and whatever else compiling it came to."""
        matcher = self._compiling.result()
        check_matcher(self._constraint, matcher)
        return matcher

    def follow(self, token_id: int) -> None:
        """The answer goes on with this one. If it may not, the next `matcher` says so."""
        self._compiling.result().consume_token(token_id)

    def leave(self) -> None:
        self._compiling.cancel()


class Constraining:
    """All constraints of one last stage, whose model is at `model_path`."""

    def __init__(self, model_path: str, thread_count: int) -> None:
        self._model_path = model_path
        self._thread_count = thread_count

    def begin(self, constraint: Constraint, generated_ids: Sequence[int], vocabulary_size: int) -> Guide:
        job = partial(_prepare, self._model_path, vocabulary_size, constraint, generated_ids)
        return Guide(constraint, deep_thread().submit(job))

    def rule(self, guides: Mapping[int, Guide], vocabulary_size: int) -> dict[int, Mask | Remark]:
        """Of each key, which tokens may come, or why there can be none now."""
        deadline = time.monotonic() + LATE_SECONDS
        found = {key: _ready(guide, deadline) for key, guide in guides.items()}
        matchers = {key: each for key, each in found.items() if isinstance(each, LLMatcher)}
        rows = self._masks(list(matchers.values()), vocabulary_size) if matchers else []
        masks = dict(zip(matchers, rows, strict=True))
        remarks = {key: each for key, each in found.items() if isinstance(each, Remark)}
        return {**remarks, **{key: _checked(guides[key], masks[key]) for key in masks}}

    def _masks(self, matchers: list[LLMatcher], vocabulary_size: int) -> NDArray[np.bool_]:
        """[matchers, vocabulary]; computed beside one another."""
        words = -(-vocabulary_size // WORD_BITS)
        bits = np.zeros((len(matchers), words), np.uint32)
        placed = [(matcher, place) for place, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(placed, bits.ctypes.data, words * bits.itemsize, len(matchers))
        return np.unpackbits(bits.view(np.uint8), axis=1, count=vocabulary_size, bitorder="little").view(np.bool_)

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor(num_threads=self._thread_count)


def _ready(guide: Guide, deadline: float) -> LLMatcher | Remark:
    try:
        return guide.matcher() if guide.is_ready(max(deadline - time.monotonic(), 0)) else LATE
    except ConstraintError as error:
        return Remark(str(error), BAD_REQUEST)
    except (CheckpointError, OSError) as error:
        return Remark(f"The tokenizer of the model can't be read at its last part: {error}.", OUR_FAULT)
    except Exception:  # the top of what the other thread did: whatever it was, it ends this request alone
        log.exception("a constraint could not be compiled")
        return Remark("The constraint of this answer could not be compiled; the log of the runner says why.", OUR_FAULT)


def _checked(guide: Guide, mask: Mask) -> Mask | Remark:
    """Computing a mask may come to a limit, or find that nothing can follow."""
    verdict = _ready(guide, 0)
    return verdict if isinstance(verdict, Remark) else mask


def _prepare(model_path: str, vocabulary_size: int, constraint: Constraint, generated_ids: Sequence[int]) -> LLMatcher:
    """Raises `ConstraintError`, `CheckpointError`, `OSError`."""
    matcher = compile_constraint(constraint, _tree(model_path, vocabulary_size))
    if generated_ids and not matcher.consume_tokens(list(generated_ids)):
        raise refused(constraint, f"what was answered so far does not fit: {matcher.get_error()}")
    matcher.compute_bitmask()  # the first mask costs most, and a grammar's worst is mostly found by it
    check_matcher(constraint, matcher)
    return matcher


@lru_cache(1)  # of the one model that a process runs
def _tree(model_path: str, vocabulary_size: int) -> LLTokenizer:
    """Raises `CheckpointError`, `OSError`."""
    return token_tree(model_tokens(load_tokenizer(open_checkpoint(model_path)), vocabulary_size))


def model_tokens(tokenizer: TextTokenizer, size: int) -> Tokens:
    """As many as there are logits. Raises `CheckpointError`."""
    stop_ids = sorted(each for each in tokenizer.stop_token_ids if each < size)
    if not stop_ids:
        raise CheckpointError("it has no token that ends an answer")
    tokens = [tokenizer.token_bytes(token_id) for token_id in range(size)]
    special_ids = [token_id for token_id, text in enumerate(tokens) if not text]
    for token_id in special_ids:
        tokens[token_id] = (tokenizer.token_text(token_id) or f"<unused {token_id}>").encode()
    return Tokens(tokens, special_ids, stop_ids, tokenizer.encode_within)
