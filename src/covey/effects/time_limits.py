"""How long a runner may take for each phase, and so a node to end, as a person set it for `covey up`."""

import math
from collections.abc import Mapping
from typing import Final

from covey.control.settings import PhaseLimits

VARIABLES: Final = {
    "COVEY_CONNECT_TIMEOUT_S": "connect_ms",
    "COVEY_LOAD_TIMEOUT_S": "load_ms",
    "COVEY_WARM_UP_TIMEOUT_S": "warm_up_ms",
    "COVEY_STEP_TIMEOUT_S": "step_ms",
    "COVEY_SHUTDOWN_TIMEOUT_S": "shut_down_ms",
}
LEAVE_S_MAX: Final = 6.0  # beside what runners may take: answers get 2 s, the mesh 2 s; then all is cancelled
SECONDS_MIN: Final = 1
SECONDS_MAX: Final = 86_400  # a day: nobody waits for longer


class TimeLimitError(Exception):
    """A variable can't be used; the message is one sentence."""


def time_limits(environment: Mapping[str, str]) -> PhaseLimits:
    """The defaults, but for what is set. Raises `TimeLimitError`."""
    given = {
        field: _milliseconds(name, environment[name]) for name, field in VARIABLES.items() if environment.get(name)
    }
    return PhaseLimits(**given)


def leave_s_max(limits: PhaseLimits) -> float:
    """How long a node that was asked to end may go on; then all is cancelled, and its runners are killed."""
    return limits.shut_down_ms / 1000 + LEAVE_S_MAX


def _milliseconds(name: str, text: str) -> int:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not SECONDS_MIN <= seconds <= SECONDS_MAX:
        limits = f"from {SECONDS_MIN} to {SECONDS_MAX}"
        raise TimeLimitError(f"{name} is '{text}', which is no number of seconds {limits}; correct it, or unset it")
    return round(seconds * 1000)
