"""The network between nodes: it delays, loses, doubles, reorders and cuts."""

from random import Random

from simulation.faults import Faults

LATE_MS_MAX = 5_000  # twice as long as a node is seen after its last word


class Network:
    """Says when a message arrives: never, once, or more often."""

    def __init__(self, random: Random, faults: Faults) -> None:
        self.random = random
        self.faults = faults
        self.cuts: set[tuple[str, str]] = set()  # (source, target): looked up, never iterated
        self.last_arrival_ms: dict[tuple[str, str], int] = {}

    def heal(self, faults: Faults) -> None:
        self.faults = faults
        self.cuts.clear()

    def is_cut(self, source: str, target: str) -> bool:
        return (source, target) in self.cuts

    def arrivals_ms(self, now_ms: int, source: str, target: str) -> list[int]:
        """When the copies of a message that is sent now arrive."""
        if self.is_cut(source, target) or self._happens(self.faults.loss_percent):
            return []
        copies = 2 if self._happens(self.faults.duplicate_percent) else 1
        return [self._arrival_ms(now_ms, source, target) for _ in range(copies)]

    def _arrival_ms(self, now_ms: int, source: str, target: str) -> int:
        if self._happens(self.faults.late_percent):
            return now_ms + self.random.randint(self.faults.delay_ms_max, LATE_MS_MAX)
        arrival_ms = now_ms + self.random.randint(1, self.faults.delay_ms_max)
        if self.faults.reorders:
            return arrival_ms
        arrival_ms = max(arrival_ms, self.last_arrival_ms.get((source, target), 0))
        self.last_arrival_ms[source, target] = arrival_ms
        return arrival_ms

    def _happens(self, percent: int) -> bool:
        return percent > 0 and self.random.randrange(100) < percent
