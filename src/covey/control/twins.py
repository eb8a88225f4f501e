"""Notices another living node with our identity: a data folder that was copied to a second machine.

The others would believe whichever spoke last. So the one that started later stops; the earlier one goes on, as a life
that is newer than its twin's.
"""

from typing import Final

from msgspec import Struct

from covey.schema.cluster import Heartbeat

LIVING_MS: Final = 2_000  # what a life that has ended had under way arrives within this time

COPIED: Final = (
    "another node with this node's identity is running: this data folder is a copy of its. "
    "`covey identity new` makes this one a node of its own."
)


class Twin(Struct):
    """One other life with our id."""

    life: str
    first_heard_ms: int
    sequence: int


class Twins:
    """What was heard of them."""

    def __init__(self, life: str) -> None:
        self.life = life
        self.twin: Twin | None = None

    def hear(self, now_ms: int, heartbeat: Heartbeat) -> bool:
        """Takes in a heartbeat with our id. True if its sender lives beside us: it has more to say, for some time."""
        if heartbeat.life == self.life:
            return False
        if self.twin is None or self.twin.life != heartbeat.life:
            self.twin = Twin(heartbeat.life, now_ms, heartbeat.sequence)
        goes_on = heartbeat.sequence > self.twin.sequence
        self.twin.sequence = max(self.twin.sequence, heartbeat.sequence)
        return goes_on and now_ms - self.twin.first_heard_ms >= LIVING_MS

    def is_older(self, age_ms: int, heartbeat: Heartbeat) -> bool:
        """Whether we started before the sender, and so go on."""
        return (age_ms, self.life) > (heartbeat.age_ms, heartbeat.life)
