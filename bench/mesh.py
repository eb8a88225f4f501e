"""What a process of its own for the mesh costs: time for a message, and idle processor time.

    python bench/mesh.py latency [--messages 500]
    python bench/mesh.py idle [--nodes 3] [--seconds 60]
    python bench/mesh.py replace [--rounds 5]

`latency` sends heartbeats over loopback, 100 a second, with TLS and sealed; beside it two Zenoh sessions within one
process, which is what the mesh was before. `idle` starts nodes without a model, waits until they see each other, and
reads processor time and written bytes of node and mesh process from /proc. `replace` says for how long another node
hears nothing when the process is replaced.
"""

import argparse
import asyncio
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import msgspec
import psutil
import zenoh
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from covey.effects import mesh, mesh_process
from covey.effects.identity import Identity, node_id_of
from covey.effects.mesh_setup import MeshSettings, mesh_setup
from covey.effects.trust import make_credentials, new_join_code
from covey.schema.cluster import Heartbeat
from covey.schema.ids import NodeId

A, B = NodeId("a" * 32), NodeId("b" * 32)
PLACES = [("lo", "127.0.0.1")]
PORT = 23590
CODE = new_join_code()


def settings() -> MeshSettings:
    key = Ed25519PrivateKey.generate()
    made = make_credentials(CODE, Identity(node_id_of(key), 1, key))
    return MeshSettings(credentials=made, interfaces=("127.0.0.1",))


def beat(sequence: int) -> Heartbeat:
    return Heartbeat(A, 1, sequence, (A, B), None, "0" * 32)


# ---- latency ----


@asynccontextmanager
async def own_processes(hear: Callable[[Heartbeat], None]) -> AsyncGenerator[Callable[[Heartbeat], None]]:
    sender = mesh.opened(A, settings(), print, print)
    receiver = mesh.opened(B, settings(), lambda received: hear(received.message), print)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sender.run)
        tasks.start_soon(receiver.run)
        yield sender.publish
        tasks.cancel_scope.cancel()


@asynccontextmanager
async def one_process(hear: Callable[[Heartbeat], None]) -> AsyncGenerator[Callable[[Heartbeat], None]]:
    loop = asyncio.get_running_loop()
    decoder = msgspec.msgpack.Decoder(Heartbeat)
    made = [mesh_setup(node, settings(), PLACES, []) for node in (A, B)]
    opened = [zenoh.open(mesh_process.config(setup, PORT + n, has_scouting=True)) for n, setup in enumerate(made)]

    def on_sample(sample: zenoh.Sample) -> None:
        loop.call_soon_threadsafe(hear, decoder.decode(sample.payload.to_bytes()))

    opened[1].declare_subscriber("every/*", on_sample)

    def send(heartbeat: Heartbeat) -> None:
        opened[0].put(
            f"every/{A}",
            msgspec.msgpack.encode(heartbeat),
            congestion_control=zenoh.CongestionControl.DROP,
            priority=zenoh.Priority.INTERACTIVE_HIGH,
            express=True,
            allowed_destination=zenoh.Locality.REMOTE,
        )

    yield send
    for session in opened:
        session.close()


async def latencies(way: Any, count: int) -> list[float]:
    """Milliseconds from `publish` to what the control machine is told."""
    sent: dict[int, float] = {}
    took: list[float] = []

    def hear(heartbeat: Heartbeat) -> None:
        if heartbeat.sequence > 0:
            took.append((time.perf_counter() - sent[heartbeat.sequence]) * 1000)
        else:
            found.set()

    found = anyio.Event()
    async with way(hear) as send:
        with anyio.fail_after(15):
            while not found.is_set():
                send(beat(0))
                await anyio.sleep(0.05)
        for sequence in range(1, count + 1):
            sent[sequence] = time.perf_counter()
            send(beat(sequence))
            await anyio.sleep(0.01)
    return sorted(took)


def latency(options: argparse.Namespace) -> None:
    for name, way in (("one process", one_process), ("own processes", own_processes)) * 2:
        took = anyio.run(latencies, way, options.messages)
        print(
            f"{name}: median {statistics.median(took):.2f} ms, 99 of 100 under {took[int(len(took) * 0.99)]:.2f} ms, "
            f"{len(took)} of {options.messages} arrived"
        )


# ---- replace ----


async def silences(rounds: int) -> list[float]:
    heard: list[float] = []
    sender = mesh.opened(A, settings(), print, print)
    receiver = mesh.opened(B, settings(), lambda _: heard.append(time.perf_counter()), print)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sender.run)
        tasks.start_soon(receiver.run)

        async def beats() -> None:
            for sequence in range(100_000):
                sender.publish(beat(sequence))
                await anyio.sleep(0.02)

        tasks.start_soon(beats)
        took: list[float] = []
        for _ in range(rounds):
            await anyio.sleep(3)
            start = time.perf_counter()
            sender._child.end("the bench wants another")  # noqa: SLF001
            await anyio.sleep(5)
            gaps = [after - before for before, after in itertools.pairwise(heard) if after > start]
            took.append(max(gaps))
        tasks.cancel_scope.cancel()
    return took


def replace(options: argparse.Namespace) -> None:
    took = anyio.run(silences, options.rounds)
    print(f"silence while the process is replaced: median {statistics.median(took):.2f} s, worst {max(took):.2f} s")


# ---- idle ----


def idle(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        nodes = [_start(Path(folder), number) for number in range(options.nodes)]
        try:
            _wait_together(options.nodes)
            time.sleep(15)  # until reports have settled
            _measure([psutil.Process(node.pid) for node in nodes], options.seconds)
        finally:
            for node in nodes:
                node.terminate()
            for node in nodes:
                node.wait(20)


def _start(folder: Path, number: int) -> "subprocess.Popen[bytes]":
    script = (
        "import sys; from pathlib import Path; from covey.cli import joining; joining.take_code(None)\n"
        "from covey.node import NodeOptions, run_node\n"
        "run_node(NodeOptions(port=int(sys.argv[2]), data_dir=Path(sys.argv[1]), name=sys.argv[1][-1], "
        "interfaces=('127.0.0.1',)), print)"
    )
    command = [sys.executable, "-c", script, str(folder / str(number)), str(PORT + number)]
    environment = {**os.environ, "COVEY_HOME": str(folder / f"home{number}"), "COVEY_JOIN": CODE.text()}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)


def _wait_together(count: int) -> None:
    for _ in range(600):
        try:
            state = httpx.get(f"http://127.0.0.1:{PORT}/cluster").json()
            if sum(member["visibility"] == "visible" for member in state["members"]) == count:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise TimeoutError


def _measure(nodes: list[psutil.Process], seconds: float) -> None:
    families = [[node, *node.children()] for node in nodes]
    before = [[_figures(process) for process in family] for family in families]
    time.sleep(seconds)
    for family, earlier in zip(families, before, strict=True):
        later = [_figures(process) for process in family]
        shares = [(a[0] - b[0]) / seconds * 100 for a, b in zip(later, earlier, strict=True)]
        written = sum(a[1] - b[1] for a, b in zip(later, earlier, strict=True))
        print(
            f"node {shares[0]:.2f} %, mesh process {sum(shares[1:]):.2f} %, together {sum(shares):.2f} % of a core; "
            f"{written} bytes written; memory {family[0].memory_info().rss >> 20} and "
            f"{sum(each.memory_info().rss for each in family[1:]) >> 20} MiB"
        )


def _figures(process: psutil.Process) -> tuple[float, int]:
    """Processor seconds by the scheduler's count, and bytes written to disk."""
    nanoseconds = sum(
        int(path.read_text().split()[0]) for path in Path(f"/proc/{process.pid}/task").glob("*/schedstat")
    )
    return nanoseconds / 1e9, process.io_counters().write_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run, option, default in (
        ("latency", latency, "--messages", 500),
        ("idle", idle, "--seconds", 60),
        ("replace", replace, "--rounds", 5),
    ):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument(option, type=int, default=default)
        if name == "idle":
            command.add_argument("--nodes", type=int, default=3)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
