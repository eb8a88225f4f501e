"""Brings intent to every node: what was just written goes to all, and a whole map to whoever shows another digest."""

from collections.abc import Container

from covey.control.cluster import Cluster, Written
from covey.control.keeping import Keeping
from covey.control.settings import MachineSettings
from covey.schema.cluster import Entry, Heartbeat, IntentKept, IntentUpdate
from covey.schema.ids import NodeId
from covey.schema.machine import Effect, Publish, SendTo


class Replication:
    """Sends this node's map where it differs, and takes others' in. What changes goes to this node's disk too."""

    def __init__(self, node_id: NodeId, settings: MachineSettings, cluster: Cluster, keeping: Keeping) -> None:
        self.node_id = node_id
        self.settings = settings
        self.cluster = cluster
        self.keeping = keeping
        self.sent_ms: dict[NodeId, int] = {}  # when a whole map last went there
        self.changed_ms: int | None = None  # when our map last changed

    def write(self, now_ms: int, events: tuple[Written, ...]) -> list[Effect]:
        """Applies what was decided here, and tells everybody."""
        if not events:
            return []
        written = self.cluster.stamp(events)
        self.take(now_ms, written)
        return [Publish(self._update(written))]

    def take(self, now_ms: int, entries: dict[str, Entry]) -> None:
        """Merges. What it lacked shows in our next heartbeat's digest to everyone else."""
        changes = self.cluster.merge(entries)
        if changes:
            self.changed_ms = now_ms
            self.keeping.change(changes)

    def take_kept(self, now_ms: int, entries: dict[str, Entry]) -> None:
        """Merges what is on this node's disk already. What was deleted meanwhile is to be deleted there, too."""
        self.changed_ms = now_ms
        changes = self.cluster.merge(entries)
        self.keeping.settle(changes)
        self.keeping.change({key: entry for key, entry in changes.items() if entry and entry != entries.get(key)})

    def hear_update(self, now_ms: int, update: IntentUpdate) -> list[Effect]:
        """Merges, and confirms what the sender wants to see kept, now or when it is."""
        self.take(now_ms, update.entries)
        if self.node_id not in update.keepers:
            return []
        return self.keeping.owe(IntentKept(self.node_id, update.node_id, update.write))

    def compare(self, now_ms: int, heartbeat: Heartbeat) -> list[Effect]:
        """Sends our map to the sender, if it holds another. It does the same, so both end with the merged one.

        Right after a change of ours the sender has not heard of it, or not told us yet that it has.
        """
        last = self.sent_ms.get(heartbeat.node_id)
        too_soon = last is not None and now_ms - last < self.settings.intent_send_ms
        just_changed = self.changed_ms is not None and now_ms - self.changed_ms < self.settings.heartbeat_ms
        if heartbeat.intent_digest == self.cluster.digest or not self.cluster.entries or too_soon or just_changed:
            return []
        self.sent_ms[heartbeat.node_id] = now_ms
        return [SendTo(heartbeat.node_id, self._update(self.cluster.entries))]

    def forget(self, present: Container[NodeId]) -> None:
        """Drops what is kept for nodes that are not there any more."""
        self.sent_ms = {node_id: sent for node_id, sent in self.sent_ms.items() if node_id in present}

    def _update(self, entries: dict[str, Entry]) -> IntentUpdate:
        return IntentUpdate(self.node_id, entries)
