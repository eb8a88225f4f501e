"""What an engine library must offer to be a stage: the wall between the runner's loop and `fake`, `onnx`, `mlx`.

An engine holds one shard's weights and the KV cache of its layers. It knows slots and positions, no requests.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from covey.schema.runner import RunnerSpec

Activations = NDArray[Any]  # [tokens] int64 token ids into the first stage; else [tokens, hidden] of a float type
Logits = NDArray[np.float32]  # [tokens whose logits are wanted, vocabulary]


class Copy(Struct, frozen=True):
    """What another slot holds already: its tokens from `start` up to the position of the piece that this belongs to."""

    source: int
    start: int


class Piece(Struct, frozen=True):
    """Consecutive tokens of one slot within a step: positions `position .. position + token_count - 1`.

    Starting at a position that the slot has passed already drops what was cached from there on.

    The last `guess_count` tokens are guesses. Then the logits of the token before them are wanted, and of each of them.
    """

    slot: int
    position: int
    token_count: int
    wants_logits: bool  # of its last token
    guess_count: int = 0
    copy: Copy | None = None  # what the slot is to hold before the piece is computed

    @property
    def row_count(self) -> int:
        """Of how many tokens, the last ones, the logits are wanted."""
        return 1 + self.guess_count if self.wants_logits else 0


class LoadProgress(Struct, frozen=True):
    layers_loaded: int
    layers_total: int
    bytes_loaded: int
    bytes_total: int


class EngineError(Exception):
    """The engine can't do what was asked of it; the message is one sentence for a person."""


class Exchange(Protocol):
    """What the ranks of a stage tell one another in the middle of a step. All of them call the same methods in the same
    order, with values of fitting shapes: C-contiguous float32 of two axes.

    Raises `LinkBrokenError` where a rank is lost.
    """

    @property
    def rank(self) -> int: ...

    @property
    def count(self) -> int:
        """How many ranks there are."""
        ...

    def add_up(self, values: NDArray[np.float32]) -> None:
        """In place: the sum over the ranks, added in the order of ranks, so it has the same bits at all of them."""
        ...

    def join(self, values: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """[rows, own columns] of each rank, side by side in the order of ranks at rank 0; None at the others."""
        ...


class _Alone:
    """The exchange of a stage that has one rank."""

    rank = 0
    count = 1

    def add_up(self, values: NDArray[np.float32]) -> None:
        """The sum is there already."""

    def join(self, values: NDArray[np.float32]) -> NDArray[np.float32] | None:
        return values


ALONE: Final[Exchange] = _Alone()


class StageEngine(Protocol):
    """One shard, loaded and run many times, always from one thread."""

    def token_texts(self, model_path: str) -> Sequence[str]:
        """The texts of a model's tokens, by id: by them a draft is known to have the same ones. Nothing for ids that
        no token has, and none at all where the engine's ids stand for no text. Also before anything is loaded.

        Raises `EngineError`, `CheckpointError`.
        """
        ...

    def load(self, spec: RunnerSpec, progress: Callable[[LoadProgress], None], exchange: Exchange) -> None:
        """Makes the shard of `spec` ready to run. What it has loaded before and `spec` wants is kept, only the rest is
        read; what is not wanted is given up, and all slots are empty. It is called in every generation, with the
        exchange of that generation, whose rank and count are those of `spec`.

        Raises `EngineError`, `CheckpointError`, `OSError`; it can't be used after that.
        """
        ...

    def warm_up(self) -> None:
        """Runs each shape that serving will use once, and forgets what it computed. A stage's ranks do it together.

        Raises `LinkBrokenError`.
        """
        ...

    def run(self, pieces: Sequence[Piece], values: Activations) -> Activations | Logits:
        """One step. `values` holds the pieces' tokens one after another.

        Returns the activations for the next stage, [tokens, hidden], or from the last stage the logits that the pieces
        want, in their order, [count, vocabulary] float32. Either is good until the next call. At ranks above 0 of the
        last stage there are none: what they return has no rows. Raises `EngineError`, `LinkBrokenError`.
        """
        ...
