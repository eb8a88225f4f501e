"""Which version of each key which life of which node has held: what the living held must not be lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from covey.schema.cluster import Entry, Version

if TYPE_CHECKING:
    from simulation.host import Host


class Ledger:
    """Filled after every change of a node's map."""

    def __init__(self) -> None:
        self.keys: dict[str, None] = {}  # all that were ever written
        self.held: dict[tuple[str, int], dict[str, Version]] = {}  # (node, boot) -> key -> the newest it held

    def hold(self, host: Host, written: Mapping[str, Entry]) -> None:
        versions = self.held.setdefault((host.node_id, host.boot), {})
        for key, entry in written.items():
            self.keys[key] = None
            versions[key] = entry.version

    def knows(self, key: str) -> bool:
        return key in self.keys

    def lost(self, host: Host, entries: Mapping[str, Entry]) -> str | None:
        """A sentence if this life of `host` held something that `entries` lacks."""
        for key, version in self.held.get((host.node_id, host.boot), {}).items():
            if key not in entries or entries[key].version < version:
                return f"{host.name} once held {key} in {version}, which is lost"
        return None
