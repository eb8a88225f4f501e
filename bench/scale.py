"""How messages, bytes and times grow with the number of nodes, in the simulated world of the real control machines.

    python bench/scale.py --nodes 2 10 30 100 --one-of 1000 [--json] [--svg docs/scale.svg]

Messages are counted and encoded as the mesh sends them; each copy that reaches a node counts as one that it receives.
Times are simulated and so do not depend on this machine, but for the last column: what one node's machine computes for
the messages of one second, in real time. Nothing is lost or delayed by more than 5 ms.

A thousand whole nodes are too much for one computer: `--one-of` runs one real machine that hears the heartbeats which
the others would send, and so says nothing of the times to agree.
"""

import argparse
import io
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import msgspec
from rich.console import Console
from rich.table import Table

from covey.schema.cluster import Heartbeat, MeshMessage
from covey.schema.ids import NodeId
from covey.schema.machine import MessageReceived
from simulation.host import Host
from simulation.people import SMALL
from simulation.world import World

GIGABYTE = 10**9
SETTLE_MS_MAX = 120_000
STEP_MS = 50


class CountingWorld(World):
    """A world that weighs what its nodes send."""

    def __init__(self) -> None:
        super().__init__(Random(1))
        self.encoder = msgspec.msgpack.Encoder()
        self.sent_count = self.sent_bytes = self.arrived_count = self.arrived_bytes = 0

    def publish(self, source: Host, message: MeshMessage) -> None:
        others = sum(host.is_up for host in self.hosts) - 1
        self._count(message, others)
        super().publish(source, message)

    def send(self, source: Host, target_id: NodeId, message: MeshMessage) -> None:
        self._count(message, 1)
        super().send(source, target_id, message)

    def _count(self, message: MeshMessage, receivers: int) -> None:
        size = len(self.encoder.encode(message))
        self.sent_count, self.sent_bytes = self.sent_count + 1, self.sent_bytes + size
        self.arrived_count += receivers
        self.arrived_bytes += receivers * size

    def rates(self, duration_ms: int) -> dict[str, float]:
        """A second and node: lets the world go on for so long."""
        self.sent_count = self.sent_bytes = self.arrived_count = self.arrived_bytes = 0
        self.run_until(self.now_ms + duration_ms)
        node_seconds = len(self.up()) * duration_ms / 1000
        return {
            "sent": self.sent_count / node_seconds,
            "received": self.arrived_count / node_seconds,
            "received_bytes": self.arrived_bytes / node_seconds,
        }

    def until(self, happened: Callable[[], bool]) -> int:
        """Milliseconds until it is so."""
        started_ms = self.now_ms
        while not happened():
            if self.now_ms - started_ms > SETTLE_MS_MAX:
                raise TimeoutError("the cluster does not come to rest")
            self.run_until(self.now_ms + STEP_MS)
        return self.now_ms - started_ms

    def is_agreed(self) -> bool:
        """Everybody sees everybody who is up, follows one leader, and holds the same intent."""
        machines = [host.machine for host in self.up() if host.machine]
        leaders = {machine.leadership.leader for machine in machines}
        maps = {machine.cluster.digest for machine in machines}
        seen = {len(machine.membership.visible(self.now_ms)) for machine in machines}
        return len(leaders) == 1 and None not in leaders and len(maps) == 1 and seen == {len(machines) - 1}


def measure(count: int, idle_s: float) -> dict[str, float]:
    world = CountingWorld()
    hosts = [world.add(f"node{number}", 16 * GIGABYTE) for number in range(count)]
    for host in hosts[:-1]:
        host.start()
    world.until(lambda: len(world.up()) == 1 or world.is_agreed())
    hosts[-1].start()
    joined_ms = world.until(world.is_agreed)
    world.run_until(world.now_ms + 3_000)
    idle = world.rates(int(idle_s * 1000))
    world.people.place(hosts[0], SMALL, 2)
    placing = world.rates(int(idle_s * 1000))
    leader = next(host for host in hosts if host.machine and host.machine.leadership.leads)
    leader.crash()
    led_ms = world.until(lambda: _follow_one(world, leader.node_id))
    return {
        **measure_one(count),
        "join_s": joined_ms / 1000,
        "leader_s": led_ms / 1000,
        **{f"idle_{name}": value for name, value in idle.items()},
        **{f"placing_{name}": value for name, value in placing.items()},
    }


def measure_one(count: int) -> dict[str, float]:
    """One second of a settled cluster, as one of its nodes lives it."""
    world = CountingWorld()
    host = world.add("node0", 16 * GIGABYTE)
    host.start()
    machine = host.machine
    assert machine
    others = [NodeId(f"{number:032x}") for number in range(1, count)]
    period_ms = world.settings.heartbeat_ms
    computed_s, received_bytes = 0.0, 0
    for beat in range(3):  # the first two make them known
        beats = [Heartbeat(each, 1, beat, (host.node_id, *others), None, "") for each in others]
        received_bytes = sum(len(world.encoder.encode(heartbeat)) for heartbeat in beats)
        started = time.process_time()
        for number, heartbeat in enumerate(beats):
            world.now_ms = 1_000 + beat * period_ms + number * period_ms // count
            machine.handle(world.now_ms, MessageReceived(heartbeat))
        computed_s = time.process_time() - started
    beats_a_second = 1000 / period_ms
    return {
        "nodes": count,
        "idle_sent": beats_a_second,
        "idle_received": beats_a_second * len(others),
        "idle_received_bytes": beats_a_second * received_bytes,
        "idle_cpu_ms": beats_a_second * computed_s * 1000,
    }


def draw(rows: list[dict[str, float]], file: Path) -> None:
    """Bars on a logarithmic scale: what a node receives, and what it computes."""
    console = Console(record=True, width=100, file=io.StringIO())
    for name, unit, most in (("idle_received_bytes", "bytes/s received", 1e9), ("idle_cpu_ms", "ms/s computed", 1e6)):
        console.print(f"[bold]a node, idle: {unit}[/bold] (each step of the scale is tenfold)")
        for row in rows:
            length = round(60 * max(0.0, math.log10(row[name] * 10)) / math.log10(most * 10))
            console.print(f"{row['nodes']:>5.0f} nodes  {'█' * max(length, 1)} {row[name]:,.1f}", highlight=False)
        console.print()
    file.write_text(console.export_svg(title="bench/scale.py"))


def _follow_one(world: World, dead: NodeId) -> bool:
    leaders = {host.machine.leadership.leader for host in world.up() if host.machine}
    return len(leaders) == 1 and not leaders & {None, dead}


COLUMNS = {
    "nodes": "nodes",
    "idle_sent": "idle: sent/s",
    "idle_received": "received/s",
    "idle_received_bytes": "received bytes/s",
    "placing_received_bytes": "placing: received bytes/s",
    "join_s": "join (s)",
    "leader_s": "new leader (s)",
    "idle_cpu_ms": "CPU ms/s",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 10, 100])
    parser.add_argument("--idle-s", type=float, default=10.0, help="simulated seconds for each of the two rates")
    parser.add_argument("--one-of", type=int, nargs="*", default=[1000])
    parser.add_argument("--svg", type=Path, help="draw the idle figures into this file")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [measure(count, options.idle_s) for count in options.nodes]
    rows += [measure_one(count) for count in options.one_of]
    if options.svg:
        draw(rows, options.svg)
    if options.json:
        print(json.dumps(rows))
        return
    table = Table(title="a second and node")
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*(f"{row[name]:,.1f}" if name in row else "-" for name in COLUMNS))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
