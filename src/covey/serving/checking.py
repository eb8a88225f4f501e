"""What of a request's sampling no model, or not this one, could follow: found before anything runs."""

import asyncio
from functools import partial

from covey.schema.generation import Sampling
from covey.schema.model import ModelCard
from covey.serving.refusal import RefusedError

BAD_REQUEST = 400


async def check_constraint(sampling: Sampling) -> None:
    """Raises `RefusedError` for a constraint that is not supported, too large, or that nothing satisfies."""
    if sampling.constraint is None:
        return
    from covey.engine.grammar import ConstraintError, check, deep_thread  # noqa: PLC0415 - its library is large

    try:
        await asyncio.wrap_future(deep_thread().submit(partial(check, sampling.constraint)))
    except ConstraintError as error:
        raise RefusedError(str(error), BAD_REQUEST, sampling.constraint.field) from None


def check_bias(sampling: Sampling, card: ModelCard) -> None:
    """Raises `RefusedError` for a token that the model does not have."""
    highest = max(sampling.logit_bias, default=-1)
    if highest >= card.vocabulary_size:
        message = f"The field 'logit_bias' names token {highest}; the ids of {card.model_id} end at"
        raise RefusedError(f"{message} {card.vocabulary_size - 1}.", BAD_REQUEST, "logit_bias")
