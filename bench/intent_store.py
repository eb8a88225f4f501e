"""How large the store is after years of commands and reports, and how soon a newcomer knows all that is left.

    python bench/intent_store.py [--commands 10000] [--reports 1000000]

A real control machine leads, and a real store keeps what it decides: so many placements, each deleted again, then so
many reports of another node. Then a second machine with an empty store joins; messages between the two are encoded
and decoded as on the mesh, and cost no time on the way. Time of the control clock is virtual; what is printed is
measured.
"""

import argparse
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from covey.checkpoints.catalogue import listed
from covey.control.machine import Machine
from covey.control.settings import MachineSettings
from covey.effects.probe import Probe
from covey.effects.store import Store, opened
from covey.schema.cluster import Accepted, DeleteInstance, MeshMessage, NodeReport, PlaceModel
from covey.schema.ids import InstanceId, NodeId
from covey.schema.machine import (
    AnswerCommand,
    CommandSubmitted,
    DeadlinePassed,
    Effect,
    EntriesKept,
    HardwareProbed,
    Input,
    KeepEntries,
    MessageReceived,
    Publish,
    SendTo,
    Started,
)

DISK_BYTES_MAX = 5_000_000
NEWCOMER_S_MAX = 2.0
STEP_MS = 50  # of the control clock


class Node:
    """A machine and its store; `outbox` holds what it has sent."""

    def __init__(self, name: str, store: Store) -> None:
        self.node_id = NodeId(name * 32)
        self.store = store
        self.machine = Machine(self.node_id, 1, name, "1", MachineSettings(engine="fake"))
        self.outbox: list[bytes] = []
        self.accepted: list[InstanceId] = []
        self.feed(0, Started(store.restored.entries, store.restored.forget_until))

    def feed(self, now_ms: int, news: Input) -> None:
        self._carry_out(now_ms, self.machine.handle(now_ms, news))

    def _carry_out(self, now_ms: int, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case KeepEntries(entries, token):
                    self.store.keep(entries)
                    self.feed(now_ms, EntriesKept(token))
                case AnswerCommand(_, Accepted(instance_id)):
                    self.accepted.append(instance_id)
                case Publish() | SendTo():
                    self.outbox.append(msgspec.msgpack.encode(effect.message))
                case _:
                    pass


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def exchange(now_ms: int, one: Node, other: Node) -> None:
    for source, target in ((one, other), (other, one)):
        sent, source.outbox = source.outbox, []
        for message in sent:
            target.feed(now_ms, MessageReceived(msgspec.msgpack.decode(message, type=MeshMessage)))


def live(node: Node, folder: Path, count: int) -> tuple[int, int]:
    """(the control clock at the end, the largest size of the store) of so many placements and deletions."""
    card = min(listed(), key=lambda each: each.file_bytes)
    now_ms = largest = 0
    for now_ms in range(0, 4_000, STEP_MS):
        node.feed(now_ms, DeadlinePassed())
    for number in range(count):
        now_ms += STEP_MS
        node.feed(now_ms, CommandSubmitted(f"{node.node_id[:8]}-1-{number}", PlaceModel(card=card, slot_count=1)))
        node.feed(now_ms, CommandSubmitted(f"{node.node_id[:8]}-1-d{number}", DeleteInstance(node.accepted[-1])))
        node.outbox.clear()
        if number % 100 == 0:
            largest = max(largest, disk_bytes(folder))
    assert len(node.accepted) == 2 * count
    return now_ms, max(largest, disk_bytes(folder))


def report(node: Node, now_ms: int, count: int) -> int:
    last = node.machine.reporter.last
    assert last is not None
    for sequence in range(1, count + 1):
        now_ms += 1
        news = NodeReport(
            node_id=NodeId("c" * 32), boot=1, sequence=sequence, name="c", version="1", api_address=None,
            hardware=last.hardware, downloads=(), runners=(),
        )  # fmt: skip
        node.feed(now_ms, MessageReceived(news))
        node.outbox.clear()
    return now_ms


def join(leader: Node, newcomer: Node, now_ms: int) -> float:
    """Seconds until both hold the same map, on disk too: what the control clock waited, and the work."""
    started, began_ms = time.perf_counter(), now_ms
    newcomer.feed(now_ms, DeadlinePassed())
    for _ in range(100):
        exchange(now_ms, leader, newcomer)
        if newcomer.machine.cluster.digest == leader.machine.cluster.digest and newcomer.machine.keeping.is_free:
            return time.perf_counter() - started + (now_ms - began_ms) / 1000
        now_ms += STEP_MS
        for node in (leader, newcomer):
            node.feed(now_ms, DeadlinePassed())
    raise TimeoutError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commands", type=int, default=10_000)
    parser.add_argument("--reports", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name, each) for each in "ab"]
        for folder in folders:
            folder.mkdir()
        with opened(folders[0], "1") as first, opened(folders[1], "1") as second:
            leader = Node("a", first)
            leader.feed(0, HardwareProbed(Probe(folders[0]).hardware()))
            started = time.perf_counter()
            now_ms, largest = live(leader, folders[0], options.commands)
            each_ms = (time.perf_counter() - started) * 1000 / (2 * options.commands)
            print(
                f"{options.commands} placements and deletions: {each_ms:.2f} ms each, on disk before they are answered"
            )
            started = time.perf_counter()
            now_ms = report(leader, now_ms, options.reports)
            each_us = (time.perf_counter() - started) * 1e6 / max(1, options.reports)
            print(f"{options.reports} reports: {each_us:.0f} us each")
            largest = max(largest, disk_bytes(folders[0]))
            print(f"store: {len(leader.machine.cluster.entries)} entries, {largest / 1e6:.2f} MB at its largest")
            newcomer = Node("b", second)
            newcomer_s = join(leader, newcomer, now_ms)
            print(f"a newcomer has it all on its disk after {newcomer_s:.2f} s")
    return 0 if largest <= DISK_BYTES_MAX and newcomer_s <= NEWCOMER_S_MAX else 1


if __name__ == "__main__":
    raise SystemExit(main())
