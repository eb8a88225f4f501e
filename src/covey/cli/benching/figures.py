"""What a round of answers comes to: speeds, waits and memory, and how two servers compare. Pure.

A round is so many requests at once. Every measure is a number of one round; what is shown is the median of the rounds,
and two servers are compared round by round, since whatever else the machine does meets both.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median
from typing import Final

from msgspec import Struct

from covey.cli.benching.asking import Sample


class Case(Struct, frozen=True):
    """What is measured: so many requests at once, each with so many tokens of prompt and answer."""

    prompt_tokens: int
    new_tokens: int
    concurrency: int

    def __str__(self) -> str:
        at_once = f", {self.concurrency} at once" if self.concurrency > 1 else ""
        return f"{self.prompt_tokens} + {self.new_tokens} tokens{at_once}"


class Round(Struct, frozen=True):
    """The answers to requests that were sent at once, and what the model's processes held then."""

    samples: tuple[Sample, ...]
    memory_bytes: int

    @property
    def seconds(self) -> float:
        return max(sample.ended_s for sample in self.samples) - min(sample.sent_s for sample in self.samples)


class Measure(Struct, frozen=True):
    """`of` a round: None where it has none, as an answer of one token has no time between two."""

    title: str
    unit: str
    of: Callable[[Round], float | None]
    more_is_better: bool = False


class Ratio(Struct, frozen=True):
    """How many times as good as the other: above 1 is better, also where less is, as of times. Over all rounds."""

    median: float
    least: float
    most: float


def percentile(values: Sequence[float], share: float) -> float | None:
    """Linear between the two nearest, as NumPy's default. None of nothing."""
    if not values:
        return None
    ordered, place = sorted(values), share * (len(values) - 1)
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def total_speed(measured: Round) -> float | None:
    """Tokens of prompts and answers by the time of the whole round: what a server gets done."""
    return _rate(sum(each.prompt_tokens + each.new_tokens for each in measured.samples), measured.seconds)


def prefill_speed(measured: Round) -> float | None:
    """Tokens of prompts by the time until all have been read, which is when the last answer begins.

    What a prefix cache held of them was not read, and does not count.
    """
    if not all(each.pieces_s for each in measured.samples):
        return None
    began = min(each.sent_s for each in measured.samples)
    answering = max(each.pieces_s[0] for each in measured.samples)
    return _rate(sum(each.prompt_tokens - each.cached_tokens for each in measured.samples), answering - began)


def decode_speed(measured: Round) -> float | None:
    """Tokens after the first ones (which prefill gives) by the time from the first of all to the last."""
    answers = [each for each in measured.samples if len(each.pieces_s) > 1]
    if not answers:
        return None
    first, last = min(each.pieces_s[0] for each in answers), max(each.pieces_s[-1] for each in answers)
    return _rate(sum(each.new_tokens - 1 for each in answers), last - first)


def first_token_ms(measured: Round) -> float | None:
    """From sending to the first piece of text, of the median request."""
    return percentile([1000 * (each.pieces_s[0] - each.sent_s) for each in measured.samples if each.pieces_s], 0.5)


def between_ms(share: float) -> Callable[[Round], float | None]:
    """The time between two pieces of text of an answer: `share` of them took no longer."""

    def of(measured: Round) -> float | None:
        gaps = (after - before for each in measured.samples for before, after in pairwise(each.pieces_s))
        return percentile([1000 * gap for gap in gaps], share)

    return of


def memory_megabytes(measured: Round) -> float | None:
    """None where the server does not say."""
    return measured.memory_bytes / 1e6 or None


MEASURES: Final = {
    "prefill": Measure("prefill", "tokens/s", prefill_speed, more_is_better=True),
    "decode": Measure("decode", "tokens/s", decode_speed, more_is_better=True),
    "total": Measure("total", "tokens/s", total_speed, more_is_better=True),
    "first_token": Measure("first token", "ms", first_token_ms),
    "token_p50": Measure("each token, p50", "ms", between_ms(0.50)),
    "token_p95": Measure("each token, p95", "ms", between_ms(0.95)),
    "token_p99": Measure("each token, p99", "ms", between_ms(0.99)),
    "memory": Measure("memory", "MB", memory_megabytes),
}


def figures(measured: Round) -> dict[str, float | None]:
    return {name: measure.of(measured) for name, measure in MEASURES.items()}


def medians(rounds: Sequence[Round]) -> dict[str, float | None]:
    """Of each measure, over the rounds that have it."""
    return {name: percentile(_known(rounds, name), 0.5) for name in MEASURES}


def ratios(ours: Sequence[Round], theirs: Sequence[Round]) -> dict[str, Ratio | None]:
    """Of each measure; `ours` and `theirs` were measured in turn."""
    return {name: _ratio(ours, theirs, measure) for name, measure in MEASURES.items()}


def _ratio(ours: Sequence[Round], theirs: Sequence[Round], measure: Measure) -> Ratio | None:
    pairs = [(measure.of(our), measure.of(their)) for our, their in zip(ours, theirs, strict=True)]
    quotients = [our / their for our, their in pairs if our and their]
    if not quotients:
        return None
    found = quotients if measure.more_is_better else [1 / quotient for quotient in quotients]
    return Ratio(median(found), min(found), max(found))


def _known(rounds: Sequence[Round], name: str) -> list[float]:
    values = [MEASURES[name].of(each) for each in rounds]
    return [value for value in values if value is not None]


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if tokens > 0 and seconds > 0 else None
