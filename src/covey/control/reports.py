"""What this node says of itself, and when: on change, coalesced, and now and then when nothing changes.

Free memory moves all the time; a figure counts as changed only if it moved by a step that could matter to a
placement.
"""

from collections.abc import Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from covey.control.runner_table import ProcessKey
from covey.control.settings import MachineSettings
from covey.schema.cluster import DownloadReport, Hardware, NodeReport, RunnerReport
from covey.schema.ids import ModelId, NodeId, RunnerId
from covey.schema.runner import Address


class Content(Struct, frozen=True, kw_only=True):
    """All of a report but its number."""

    api_address: Address | None
    hardware: Hardware | None
    downloads: tuple[DownloadReport, ...]
    runners: tuple[RunnerReport, ...]
    models_on_disk: tuple[ModelId, ...]
    notices: tuple[str, ...]


Held = dict[ProcessKey, int]  # bytes of each process as last probed; 0 until loaded


class MemoryFigures:
    """The hardware as probed, and what runners hold of it, steadied.

    What a runner will take is promised in full until it has loaded. So a probe while it loads would count a part of
    that twice: then the last settled figure goes on to count, less what runners have loaded, and their caches filled,
    since. What is free and what runners hold is told together, since the one falls as the other grows.
    """

    def __init__(self, settings: MachineSettings) -> None:
        self.settings = settings
        self.probed: Hardware | None = None
        self.held_at_probe: Held = {}
        self.is_settled = True
        self.settled_bytes = 0  # free at the last probe during which no runner took memory or gave it back
        self.held_settled: Held = {}
        self.shown: Hardware | None = None
        self.held_shown: Held = {}
        self.revision = 0

    def probe(self, hardware: Hardware, held: Held, *, is_settled: bool) -> None:
        if is_settled or self.probed is None:
            self.settled_bytes, self.held_settled = hardware.memory_bytes_available, held
        self.revision += 1
        self.probed, self.held_at_probe, self.is_settled = hardware, held, is_settled

    def show(self, held: Held) -> Hardware | None:
        """What to report now: the last figures shown, unless they are wrong by a step."""
        if self.probed is None:
            return None
        current = replace(self.probed, memory_bytes_available=self._available(held))
        if self.shown is None or self._differs(self.shown, current) or self._moved(current, held):
            self.shown, self.held_shown = current, held
        return self.shown

    def steady(self, reports: Sequence[RunnerReport], keys: Mapping[RunnerId, ProcessKey]) -> tuple[RunnerReport, ...]:
        """With what each runner's process held when `show` last had something new to show."""
        return tuple(
            replace(each, resident_bytes=self.held_shown.get(keys[each.runner_id], 0)) if each.resident_bytes else each
            for each in reports
        )

    def free_bytes(self, held: Held) -> int | None:
        """What is surely free now, not steadied; None before the first probe."""
        return None if self.probed is None else min(self._available(held), self.probed.memory_bytes_available)

    def is_fresh(self, held: Held) -> bool:
        """Whether the last probe was settled, and no runner has started, loaded or ended since."""
        return self.is_settled and held == self.held_at_probe

    def _available(self, held: Held) -> int:
        taken = sum(max(0, count - self.held_settled.get(key, 0)) for key, count in held.items())
        return max(0, self.settled_bytes - taken)

    def _step(self, hardware: Hardware) -> int:
        return max(self.settings.memory_step_bytes, hardware.memory_bytes_total // self.settings.memory_step_fraction)

    def _moved(self, current: Hardware, held: Held) -> bool:
        """Whether a runner has loaded, or its cache has filled by a step."""
        pairs = [(count, self.held_shown.get(key, 0)) for key, count in held.items()]
        return any(bool(count) != bool(shown) or abs(count - shown) >= self._step(current) for count, shown in pairs)

    def _differs(self, shown: Hardware, current: Hardware) -> bool:
        moved = max(
            abs(shown.memory_bytes_available - current.memory_bytes_available),
            abs(shown.swap_bytes_available - current.swap_bytes_available),
            abs(shown.disk_bytes_available - current.disk_bytes_available),
        )
        return moved >= self._step(current) or _fixed(shown) != _fixed(current)


class Reporter:
    """Numbers and spaces this node's reports. `last` is the one that everybody should have.

    `revision` grows when a report says something else than the one before.
    """

    def __init__(self, node_id: NodeId, boot: int, name: str, version: str, settings: MachineSettings) -> None:
        self.node_id = node_id
        self.boot = boot
        self.name = name
        self.version = version
        self.settings = settings
        self.last: NodeReport | None = None
        self.content: Content | None = None  # of that
        self.revision = 0
        self.last_ms = 0
        self.waits = False  # for the spacing, with something to say

    def advance(self, now_ms: int, content: Content, sequence: int) -> NodeReport | None:
        """The report to publish now, if one is due; it takes `sequence`."""
        since_ms = now_ms - self.last_ms
        changed = content != self.content
        self.waits = changed and self.content is not None and since_ms < self.settings.report_spacing_ms
        if self.waits or not (changed or since_ms >= self.settings.report_idle_ms):
            return None
        self.content, self.last_ms = content, now_ms
        self.revision += changed
        self.last = NodeReport(
            node_id=self.node_id,
            boot=self.boot,
            sequence=sequence,
            name=self.name,
            version=self.version,
            api_address=content.api_address,
            hardware=content.hardware,
            downloads=content.downloads,
            runners=content.runners,
            models_on_disk=content.models_on_disk,
            public_key=self.settings.public_key,
            notices=content.notices,
        )
        return self.last

    def deadline(self) -> int | None:
        if self.last is None:
            return None
        return self.last_ms + (self.settings.report_spacing_ms if self.waits else self.settings.report_idle_ms)


def _fixed(hardware: Hardware) -> Hardware:
    """What is compared exactly."""
    return replace(hardware, memory_bytes_available=0, swap_bytes_available=0, disk_bytes_available=0)
