"""What the head tells the stages and what the last stage answers: plain data, one message a step.

Every link keeps the order of what is sent on it, so a slot can be given to the next request at once: whatever is
still in flight for the one before is computed, and forgotten, first.
"""

from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from covey.engine.contract import Piece
from covey.schema.generation import Likelihood, Sampling

Values = NDArray[Any]  # what a frame carries beside its message: activations


class SamplingStart(Struct, frozen=True, array_like=True):
    """How the tokens of a slot are picked from now on. The lists hold only what penalties and a constraint need."""

    slot: int
    sampling: Sampling
    prompt_ids: tuple[int, ...] = ()
    generated_ids: tuple[int, ...] = ()


class StepPlan(Struct, frozen=True, tag=True):
    """One step, on its way through all stages. `released` slots are free; it counts before `begun`."""

    step: int
    pieces: tuple[Piece, ...]
    begun: tuple[SamplingStart, ...] = ()
    released: tuple[int, ...] = ()
    guesses: dict[int, tuple[int, ...]] = {}  # by slot: what its piece ends with


class Remark(Struct, frozen=True, array_like=True):
    """What is to be told of a token beside its id."""

    failure: str = ""  # why there is none
    status: int = 500  # the HTTP status that fits the failure
    is_late: bool = False  # it can't be picked yet: the same logits are wanted again
    likelihood: Likelihood | None = None


class StepOutcome(Struct, frozen=True, tag=True, omit_defaults=True):
    """The tokens of the pieces that wanted logits, in their order; None: there is none, and its remark says why."""

    step: int
    token_ids: tuple[int | None, ...]
    failure: str = ""  # of one of them, for heads that know no remarks
    remarks: dict[int, Remark] = {}  # by the place in `token_ids`; few have one
    followers: dict[int, tuple[int, ...]] = {}  # by the place: what was picked next, since the guess before was right


class PlannedStep(Struct, frozen=True):
    """A plan, and the tokens that the first stage starts it with."""

    plan: StepPlan
    token_ids: NDArray[np.int64]
