"""Which faults a run has. Each seed first draws the set, so that rare combinations come up and calm runs do too."""

import random
from dataclasses import dataclass

LATENCY_MS = 5


@dataclass(frozen=True)
class Faults:
    """Drawn once per seed. A rate of 0 means that the run is free of this fault."""

    nodes: int
    late_nodes: int  # join while the run is under way
    delay_ms_max: int
    loss_percent: int
    duplication_percent: int
    crash_interval_ms: int  # 0: no node crashes
    leave_interval_ms: int  # 0: no node leaves in an orderly way
    runner_exit_percent: int  # per phase of a runner
    fetch_failure_percent: int
    fetch_ms_max: int
    people_interval_ms: int


def draw(dice: random.Random) -> Faults:
    """The faults of one run."""

    def perhaps(low: int, high: int) -> int:
        return dice.choice((0, dice.randint(low, high)))

    return Faults(
        nodes=dice.randint(1, 4),
        late_nodes=dice.choice((0, 0, 1, 2)),
        delay_ms_max=dice.choice((LATENCY_MS, 50, 400, 1500)),
        loss_percent=perhaps(1, 20),
        duplication_percent=perhaps(1, 30),
        crash_interval_ms=perhaps(5_000, 30_000),
        leave_interval_ms=perhaps(15_000, 60_000),
        runner_exit_percent=perhaps(1, 15),
        fetch_failure_percent=perhaps(5, 50),
        fetch_ms_max=dice.choice((20, 2_000, 15_000)),
        people_interval_ms=dice.choice((2_000, 8_000, 30_000)),
    )
