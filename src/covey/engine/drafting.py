"""Decides when a draft model guesses, and how much: by how well it guessed lately, and by what it costs. Pure.

What a guess costs is measured: the draft's time for one, against the time that a step with one token takes over all
stages. Where that does not pay, the draft only tries now and then, since the text may change. Trying guesses nothing
that a step computes: what the draft says is compared with what comes. Its own
time is no more than `TRYING_SHARE` of that of the steps.

The draft reads a text before it guesses. Where that takes several of its runs, there are steps between them, in all for
as long as the reading: an answer may be over before the draft could be of use.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

from covey.engine.guessing import ROW_COST, Guesses, Trust
from covey.engine.request import Key, Request
from covey.schema.generation import Sampling

MEMORY: Final = 0.95  # a draft's rate is much the same over a text; of the last 20 guesses it is known to a tenth
PRIOR: Final = (0.6, 1.0)  # hits of tries
TRIED: Final = 4  # guesses that are only compared
TRYING_SHARE: Final = 0.01  # of the time of steps, where the draft does not pay; 0.02 cost 4 to 5 %, measured
READING_SHARE: Final = 1.0  # where it does, or is not known yet: what more than one run of reading takes
SMOOTHING: Final = 0.2  # what a time that is longer than those before counts


class Drafted(NamedTuple):
    """What a draft said, and the seconds that this took. It says nothing while it has more to read."""

    token_ids: tuple[int, ...]
    reading_s: float  # of what it lacked
    guessing_s: float


class Drafter(Protocol):
    """A smaller model with the same vocabulary."""

    def guess(self, tokens: Sequence[int], most: int, sampling: Sampling) -> Drafted:
        """Reads of `tokens` what it lacks, as far as one run goes, then guesses up to `most` that may follow, picked as
        `sampling` says.
        """
        ...


class Drafting:
    """For one head. What it knows of the draft outlives requests."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self._trust = Trust(MEMORY, *PRIOR)
        self._key: Key | None = None  # of the request whose tokens were looked at
        self._seen = 0  # so many of them
        self._is_reading = False  # the draft has not read all of them
        self._pays = True
        self._owed_s = 0.0  # drafting that is to be made up for by steps, before there is more
        self._guess_s: float | None = None  # that one guess takes
        self._step_s: float | None = None  # that a step with one token takes

    def improve(self, request: Request, most: int, found: Guesses) -> Guesses:
        """What the draft guesses after the tokens of a request, up to `most`, or else what was `found`."""
        self._look(request)
        count, gain = self._best(most)
        self._pays = count > 0
        if count > 0 and gain <= found.gain:
            return found
        if self._is_known and self._pays and not (self._is_reading and self._owed_s > 0):
            drafted = self._draft(request, count)
            self._owed_s += drafted.reading_s
            seconds = drafted.reading_s + drafted.guessing_s
            return Guesses(drafted.token_ids, gain, seconds) if drafted.token_ids else found._replace(seconds=seconds)
        return found if found.token_ids or self._owed_s > 0 else found._replace(seconds=self._try(request, most))

    def note_step(self, seconds: float, guess_count: int) -> None:
        """What a step of one request took that had the engine to itself, from the end of guessing on."""
        share = READING_SHARE if self._pays else TRYING_SHARE
        self._owed_s = max(self._owed_s - share * seconds, 0.0)
        least = seconds / (1 + ROW_COST * guess_count)  # of a step with guesses only the bounds are known
        within = least if self._step_s is None else min(max(self._step_s, least), seconds)
        self._step_s = _followed(self._step_s, within)

    @property
    def _is_known(self) -> bool:
        return self._guess_s is not None and self._step_s is not None

    def _look(self, request: Request) -> None:
        """Compares what came with what was expected, if it is the same text."""
        if request.key == self._key:
            self._trust.see(request.tokens[self._seen :])
        else:
            self._key, self._is_reading = request.key, False
            self._trust.expect(())
        self._seen = len(request.tokens)

    def _best(self, most: int) -> tuple[int, float]:
        """As of `Trust`. What is not known yet costs nothing."""
        cost = self._guess_s / self._step_s if self._guess_s is not None and self._step_s else 0.0
        return self._trust.best(most, ROW_COST + cost)

    def _try(self, request: Request, most: int) -> float:
        """Lets the draft say what is only compared; returns the seconds that it took."""
        drafted = self._draft(request, min(TRIED, most))
        seconds = drafted.reading_s + drafted.guessing_s
        self._owed_s += seconds
        return seconds

    def _draft(self, request: Request, count: int) -> Drafted:
        drafted = self._drafter.guess(request.tokens, count, request.admit.sampling)
        self._trust.expect(drafted.token_ids)
        self._is_reading = not drafted.token_ids
        if drafted.token_ids:
            self._guess_s = _followed(self._guess_s, drafted.guessing_s / len(drafted.token_ids))
        return drafted


def _followed(known_s: float | None, latest_s: float) -> float:
    """What something takes, by the latest time of it: other work only ever adds to that, so what is less counts."""
    return latest_s if known_s is None else min(latest_s, known_s + SMOOTHING * (latest_s - known_s))
