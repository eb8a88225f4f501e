"""What an engine library must offer to be a stage: the wall between the runner's loop and `fake`, `onnx`, `mlx`.

An engine holds one shard's weights and the KV cache of its layers. It knows slots and positions, no requests.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from covey.schema.runner import RunnerSpec

Activations = NDArray[Any]  # [tokens] int64 token ids into the first stage; else [tokens, hidden] of a float type
Logits = NDArray[np.float32]  # [tokens whose logits are wanted, vocabulary]


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


class StageEngine(Protocol):
    """One shard, loaded and run many times, always from one thread."""

    def load(self, spec: RunnerSpec, progress: Callable[[LoadProgress], None]) -> None:
        """Makes the shard of `spec` ready to run. What it has loaded before and `spec` wants is kept, only the rest is
        read; what is not wanted is given up, and all slots are empty.

        Raises `EngineError`, `CheckpointError`, `OSError`; it can't be used after that.
        """
        ...

    def warm_up(self) -> None:
        """Runs each shape that serving will use once, and forgets what it computed."""
        ...

    def run(self, pieces: Sequence[Piece], values: Activations) -> Activations | Logits:
        """One step. `values` holds the pieces' tokens one after another.

        Returns the activations for the next stage, [tokens, hidden], or from the last stage the logits that the pieces
        want, in their order, [count, vocabulary] float32. Either is good until the next call.
        """
        ...
