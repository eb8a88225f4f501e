"""Which version of each key which life of which node has held: what the living held must not be lost.

And what each version of each key was, and which of them were lost with a disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from covey.control.cluster import FORGOTTEN
from covey.schema.cluster import Entry, Version
from simulation.failure import Failure

if TYPE_CHECKING:
    from simulation.host import Host


class Ledger:
    """Filled after every change of a node's map."""

    def __init__(self) -> None:
        self.keys: dict[str, None] = {}  # all that were ever written
        self.written: dict[tuple[str, Version], bytes | None] = {}
        self.lost_with_disk: dict[str, Version] = {}  # the newest version of a key that no disk held any more
        self.copies_lost: dict[str, None] = {}  # keys that a lost disk held, whoever else holds them
        self.held: dict[tuple[str, int], dict[str, Version]] = {}  # (node, boot) -> key -> the newest it held

    def hold(self, host: Host, written: Mapping[str, Entry]) -> None:
        versions = self.held.setdefault((host.node_id, host.boot), {})
        for key, entry in written.items():
            versions[key] = entry.version
            self.write(host, key, entry)

    def write(self, host: Host, key: str, entry: Entry) -> None:
        """A version means one value, whatever happened between.

        Keys are fresh but for `forgotten`: of that one a node may use a version again when its disk, or the write
        that was under way, is lost. Then the encoding decides (`cluster.is_newer`), and that all nodes end with the
        same map is looked at in the end.
        """
        self.keys[key] = None
        if key == FORGOTTEN:
            self.written[key, entry.version] = entry.value
        if self.written.setdefault((key, entry.version), entry.value) != entry.value:
            raise Failure(f"{host.name}: {key} has two values in one version, {entry.version}")

    def lose(self, host: Host, kept: Mapping[str, Entry]) -> None:
        """The disk of `host` is gone; of what it held something may have been nowhere else."""
        self.copies_lost |= dict.fromkeys(kept)
        others = [other.disk for other in host.world.hosts if other is not host]
        for key, entry in kept.items():
            if not any(disk.holds(key, entry) for disk in others):
                self.lost_with_disk[key] = max(entry.version, self.lost_with_disk.get(key, entry.version))

    def knows(self, key: str) -> bool:
        return key in self.keys

    def lost(self, host: Host, entries: Mapping[str, Entry]) -> str | None:
        """A sentence if this life of `host` held something that `entries` lacks, unless deletions are forgotten."""
        held = {} if host.world.forgets else self.held.get((host.node_id, host.boot), {})
        for key, version in held.items():
            if key not in entries or entries[key].version < version:
                return f"{host.name} once held {key} in {version}, which is lost"
        return None
