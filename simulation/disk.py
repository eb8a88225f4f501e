"""The disk of a host: what it has synced outlives everything but its own loss; what is under way may end torn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from covey.schema.cluster import Entry
from covey.schema.machine import EntriesKept, KeepEntries, KeepingFailed
from simulation.failure import Failure

if TYPE_CHECKING:
    from simulation.host import Host

FULL = "the disk is full"


class Disk:
    """Writes one batch at a time. A power cut in the middle leaves a part of the batch, from its beginning on."""

    def __init__(self, host: Host) -> None:
        self.host, self.world = host, host.world
        self.entries: dict[str, Entry] = {}
        self.under_way: KeepEntries | None = None
        self.is_full = False

    def write(self, effect: KeepEntries) -> None:
        if self.under_way:
            raise Failure(f"{self.host.name}: it writes {effect.token} while {self.under_way.token} is under way")
        self.under_way = effect
        self.world.after(self.world.faults.disk_ms_max, self._finish, effect, self.host.boot)

    def cut_power(self) -> None:
        """Any part of what was under way may have arrived."""
        effect, self.under_way, self.is_full = self.under_way, None, False
        if effect:
            count = self.world.random.randint(0, len(effect.entries))
            self._apply(dict(list(effect.entries.items())[:count]))

    def replace(self) -> None:
        """It broke; a new one is empty."""
        self.world.note(f"the disk of {self.host.name} is replaced")
        kept, self.entries = self.entries, {}
        self.world.ledger.lose(self.host, kept)

    def holds(self, key: str, entry: Entry) -> bool:
        """Whether it has this version of the key, or a newer one."""
        held = self.entries.get(key)
        return held is not None and held.version >= entry.version

    def _finish(self, effect: KeepEntries, boot: int) -> None:
        if effect is not self.under_way or boot != self.host.boot:
            return
        self.under_way = None
        if self.is_full:
            self.host.answer(KeepingFailed(effect.token, FULL), boot)
            return
        self._apply(effect.entries)
        self.host.safety.kept(effect)
        self.host.answer(EntriesKept(effect.token), boot)

    def _apply(self, entries: dict[str, Entry | None]) -> None:
        for key, entry in entries.items():
            if entry:
                self.entries[key] = entry
            else:
                self.entries.pop(key, None)
