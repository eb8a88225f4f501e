"""The node's clock: whole milliseconds of a clock that also counts the time that the machine sleeps.

An ordinary monotonic clock stops while a laptop sleeps, so that it would wake up believing that it heard everybody
just now. Linux counts sleep in CLOCK_BOOTTIME. macOS counts it in CLOCK_MONOTONIC_RAW (its `mach_continuous_time`),
though not in what `time.monotonic` reads (`mach_absolute_time`).
"""

import sys
import time
from collections.abc import Callable
from typing import Final

NS_PER_MS: Final = 1_000_000

Clock = Callable[[], int]


def now_ms() -> int:
    """Only differences mean anything."""
    return time.clock_gettime_ns(_CLOCK_ID) // NS_PER_MS


def unix_ms() -> int:
    """What a person's clock shows. To be shown to people, and for nothing else: it may be wrong, and jump."""
    return time.time_ns() // NS_PER_MS


def _clock_id() -> int:
    if sys.platform == "darwin":
        return time.CLOCK_MONOTONIC_RAW
    return getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


_CLOCK_ID: Final = _clock_id()
