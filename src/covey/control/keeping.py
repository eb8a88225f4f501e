"""What goes to this node's disk: one write at a time, each with all that has changed since the one before.

A write that failed (a full disk) is tried again after a while, with what has changed meanwhile; the node goes on
serving from memory. Confirmations that others wait for are sent when what they ask about is on the disk.
"""

from msgspec import Struct

from covey.control.cluster import Changes
from covey.control.settings import ACKNOWLEDGEMENTS_MAX, MachineSettings
from covey.schema.cluster import Entry, IntentKept
from covey.schema.machine import Effect, KeepEntries, SendTo


class Owed(Struct, frozen=True):
    """A confirmation that waits for the write `token`."""

    token: int
    message: IntentKept


class Keeping:
    """Knows what of the map is on the disk. `token` is that of the last write."""

    def __init__(self, settings: MachineSettings) -> None:
        self.settings = settings
        self.token = 0
        self.unkept: Changes = {}  # that no write carries yet
        self.under_way: Changes | None = None
        self.due_ms: int | None = None  # after a failure: when to try again
        self.failures = 0  # in a row
        self.notices: tuple[str, ...] = ()  # why what waits for the disk is not there yet
        self.owed: list[Owed] = []

    @property
    def is_free(self) -> bool:
        return self.under_way is None

    def change(self, changes: Changes) -> None:
        """The map is different; the disk is to follow."""
        self.unkept = {**self.unkept, **changes}

    def settle(self, changes: Changes) -> None:
        """The map took over what the disk holds already: an older version that came meanwhile must not go there."""
        forgotten = {key: entry for key, entry in changes.items() if entry is None}
        self.unkept = {**{key: entry for key, entry in self.unkept.items() if key not in changes}, **forgotten}

    def write(self, decided: dict[str, Entry]) -> KeepEntries:
        """Begins a write of all that has changed, and of what was `decided` and is not in the map yet."""
        assert self.is_free
        self.token += 1
        self.under_way, self.unkept = self.unkept, {}
        return KeepEntries({**self.under_way, **decided}, self.token)

    def advance(self, now_ms: int) -> list[Effect]:
        """The write that is due, if one is."""
        if not self.unkept or not self.is_free or (self.due_ms is not None and now_ms < self.due_ms):
            return []
        return [self.write({})]

    def hear_kept(self, token: int) -> list[Effect]:
        """The write has ended well; a stale answer changes nothing."""
        if self.is_free or token != self.token:
            return []
        self.under_way, self.due_ms, self.failures, self.notices = None, None, 0, ()
        ready = [SendTo(owed.message.target, owed.message) for owed in self.owed if owed.token <= token]
        self.owed = [owed for owed in self.owed if owed.token > token]
        return [*ready]

    def hear_failed(self, now_ms: int, token: int, reason: str) -> None:
        """Nothing of it was written. Who waits for a confirmation asks again, or does without."""
        if self.under_way is None or token != self.token:
            return
        steps = self.settings.keep_back_off_ms
        self.due_ms = now_ms + steps[min(self.failures, len(steps) - 1)]
        self.failures += 1
        self.under_way, self.unkept = None, {**self.under_way, **self.unkept}
        self.notices = (reason,) if self.unkept else ()  # else nothing waits: who asked for it was told
        self.owed = []

    def owe(self, message: IntentKept) -> list[Effect]:
        """Confirms at once if the disk holds all that the map does, else after the write that brings the rest.

        Somebody waits for that one, so it is not put off, even if the last one failed.
        """
        if self.is_free and not self.unkept:
            return [SendTo(message.target, message)]
        self.due_ms = None
        if len(self.owed) < ACKNOWLEDGEMENTS_MAX:
            self.owed.append(Owed(self.token + 1 if self.unkept else self.token, message))
        return []

    def deadline(self) -> int | None:
        return self.due_ms if self.unkept and self.is_free else None
