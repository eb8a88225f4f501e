"""How long a runner may take for each phase, as a person set it in the environment of `covey up`."""

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


def _milliseconds(name: str, text: str) -> int:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not SECONDS_MIN <= seconds <= SECONDS_MAX:
        limits = f"from {SECONDS_MIN} to {SECONDS_MAX}"
        raise TimeLimitError(f"{name} is '{text}', which is no number of seconds {limits}; correct it, or unset it")
    return round(seconds * 1000)
