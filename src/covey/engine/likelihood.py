"""Log probabilities of tokens by the model's own logits: at temperature 1, before bias, penalties and constraints.

So OpenAI describes them, and so vLLM gives them unless told otherwise (its `raw_logprobs`).
"""

import math
from typing import Final

import numpy as np

from covey.engine.sampling import Ids, Row, best_ids
from covey.schema.generation import Likelihood

LOGPROB_MIN: Final = -9999.0  # OpenAI's number for "as good as impossible"; JSON has no infinity


def likelihood(logits: Row, token_id: int, count: int) -> Likelihood:
    """Of `token_id`, and of the `count` likeliest; of equal ones those with lower ids."""
    best = float(logits.max())
    total = best + math.log(float(np.exp(logits - np.float32(best)).sum(dtype=np.float64)))
    ids = _best(logits, count)
    return Likelihood(
        _bounded(float(logits[token_id]) - total),
        tuple((int(each), _bounded(float(logits[each]) - total)) for each in ids),
    )


def _best(logits: Row, count: int) -> Ids:
    if count == 0:
        return np.empty(0, np.int64)
    ids = best_ids(logits, count)
    return ids[np.argsort(-logits[ids], kind="stable")][:count]


def _bounded(logprob: float) -> float:
    return max(logprob, LOGPROB_MIN)
