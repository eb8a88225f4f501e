"""The clock of one host. Only what it says differs from the world's time: by a little more or less for every second,
and, where a clock does not count sleep, by how long its host has slept.
"""

EXACT_PERMILLE = 1_000


class Clock:
    """Whole milliseconds, from a moment of the world on, `permille` for each thousand of the world's."""

    def __init__(self, permille: int = EXACT_PERMILLE) -> None:
        self.permille = permille
        self._goes_from_ms, self._stands_at_ms = 0, 0  # in the world's time, and in its own

    def now_ms(self, world_ms: int) -> int:
        """What it says at a moment of the world."""
        return self._stands_at_ms + max(0, world_ms - self._goes_from_ms) * self.permille // EXACT_PERMILLE

    def world_ms(self, own_ms: int) -> int:
        """The first moment of the world at which it says `own_ms`."""
        return self._goes_from_ms - (self._stands_at_ms - own_ms) * EXACT_PERMILLE // self.permille

    def stand_still(self, world_ms: int, until_ms: int) -> None:
        """From now on, for a while."""
        self._stands_at_ms, self._goes_from_ms = self.now_ms(world_ms), until_ms

    def go_on(self, world_ms: int) -> None:
        """From where it stands: it was woken before its time."""
        self.stand_still(world_ms, world_ms)
