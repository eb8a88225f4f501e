"""One seed, from the draw of its faults to its verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from random import Random

from msgspec import Struct

from covey.control.runner_table import UnexpectedInputError
from covey.schema.cluster import IntentUpdate
from covey.schema.machine import Effect, Input, Publish, RegroupRunner, SendTo, StartFetch, StartRunner, StopRunner
from simulation.failure import Failure
from simulation.faults import Faults, draw
from simulation.host import Host
from simulation.liveness import missing
from simulation.network import LATE_MS_MAX
from simulation.world import World

GIGABYTE = 10**9
CHUNK = 8  # seeds that a process is given at once
TROUBLE_MS = 40_000  # how long faults last
RETURN_MS = 35_000  # some come back after they were forgotten, some still sleep
LIVENESS_MS = 90_000  # 30 s until the dead are forgotten, all back-off, and time to link and load twice
SETTLE_MS = 4_500  # a probe, a report, and the leader's mending
QUIET_MS = 4_000  # how long nothing may be done once all is well
SLEEPS_MS = (1_000, 1_000, 5_000, 5_000, 35_000, 35_000, 150_000)  # unnoticed, away, forgotten, and for minutes
DRIFT_PERMILLE_MAX = 20  # real clocks are a hundred times better; what holds at 2 % holds there
ACTION_MS = 2_000  # people and faults act about this often


class Verdict(Struct, frozen=True, kw_only=True):
    """How one seed ended. `problem` None: all was well."""

    seed: int
    problem: str | None
    step_count: int
    now_ms: int
    digest: str

    def line(self) -> str:
        """The verdict in one line, from which the run can be reproduced."""
        if self.problem is None:
            return f"seed {self.seed}: ok, {self.step_count} steps, {self.now_ms / 1000:.1f} s, digest {self.digest}"
        return (
            f"seed {self.seed}: FAILED at step {self.step_count} (t={self.now_ms / 1000:.1f} s): {self.problem}; "
            f"reproduce: python -m simulation --seed {self.seed} --trace"
        )


def run(seed: int, watch: Callable[[World], None] | None = None) -> Verdict:
    """Lives through one seed. `watch` is shown the world before it begins."""
    random = Random(seed)
    world = World(random, draw(random))
    if watch:
        watch(world)
    problem = None
    try:
        _live(world)
    except (Failure, UnexpectedInputError) as failure:
        problem = str(failure)
    return Verdict(seed=seed, problem=problem, step_count=world.step_count, now_ms=world.now_ms, digest=world.digest())


def run_all(seeds: Sequence[int]) -> Iterator[Verdict]:
    """The verdicts in order, from as many processes as this machine has cores."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as processes:
        yield from processes.map(run, seeds, chunksize=CHUNK)


def _live(world: World) -> None:
    _populate(world)
    while world.now_ms < TROUBLE_MS:
        world.run_until(world.now_ms + world.random.randint(1, ACTION_MS))
        _act(world)
    _calm(world)
    wakes_ms = [host.asleep_until_ms for host in world.hosts]
    limit_ms = max(world.now_ms, *wakes_ms) + LIVENESS_MS + RETURN_MS
    world.run_until(world.now_ms + LATE_MS_MAX)
    sentence: str | None = "nothing was tried"
    while sentence:
        if world.now_ms >= limit_ms:
            raise Failure(f"{(LIVENESS_MS + RETURN_MS) // 1000} s after faults stopped {sentence}")
        world.run_until(world.now_ms + 500)
        sentence = _restless(world)
    _stay_quiet(world)


def _restless(world: World) -> str | None:
    """What is missing now or, if nothing is, a while later: freed memory shows only when it is next probed."""
    sentence = missing(world) or world.awaited()
    if sentence is None:
        world.run_until(world.now_ms + SETTLE_MS)
        sentence = missing(world)
    return sentence


def _populate(world: World) -> None:
    random, faults = world.random, world.faults
    count = random.choice((1, 2, 2, 3, 3, 4, 5))
    for number in range(count):
        memory = random.choice((1, 2, 4)) if faults.scarce_memory else random.choice((8, 16, 32))
        machine_id = f"machine {random.randint(1, 2)}" if faults.shared_machines else None
        world.add(f"node{number + 1}", memory * GIGABYTE, machine_id)
    if faults.shared_machines:  # one machine has one size
        for host in world.hosts:
            host.memory_bytes = next(each for each in world.hosts if each.machine_id == host.machine_id).memory_bytes
    for host in world.hosts:
        if faults.clocks_drift:
            host.clock.permille += random.randint(-DRIFT_PERMILLE_MAX, DRIFT_PERMILLE_MAX)
        late = faults.late_joins and random.random() < 0.5
        world.after(TROUBLE_MS if late else 300, _start, host)


def _start(host: Host) -> None:
    if not host.is_up:
        host.start()


def _act(world: World) -> None:
    """People do something now and then, and so does misfortune."""
    awake = [host for host in world.up() if not host.is_asleep]
    if awake and world.random.random() < 0.3:
        world.people.act(world.random.choice(awake))
    if world.random.random() < 0.25:
        _strike(world, world.faults)


def _strike(world: World, faults: Faults) -> None:
    random, host = world.random, world.random.choice(world.hosts)
    kinds = [
        ("crash", faults.crashes and host.is_up),
        ("leave", faults.leaves and host.is_up and not host.is_asleep),
        ("sleep", faults.sleeps and host.is_up and not host.is_asleep),
        ("partition", faults.partitions),
        ("one way", faults.one_way_cuts),
        ("greed", faults.greedy_programs),
        ("power cut", faults.power_cuts),
        ("full disk", faults.full_disks and host.is_up),
        ("lost disk", faults.lost_disks and host.is_up),
    ]
    possible = [kind for kind, is_possible in kinds if is_possible]
    kind = random.choice(possible) if possible else ""
    if kind == "crash":
        host.crash()
        world.after(random.choice((2_000, 20_000, 60_000)), _restart, host)
    elif kind == "leave":
        host.leave()
        world.after(60_000, _restart, host)
    elif kind == "sleep":
        host.sleep(world.now_ms + random.choice(SLEEPS_MS))
    elif kind == "power cut":
        _cut_power(world)
    elif kind == "full disk":
        world.note(f"the disk of {host.name} is full")
        host.disk.is_full = True
        world.after(random.choice((2_000, 20_000)), _free, host)
    elif kind == "lost disk":
        host.crash()
        host.disk.replace()
        world.after(random.choice((2_000, 20_000)), _restart, host)
    elif kind == "greed":
        _take_memory(host, random.randint(1, 8) * host.memory_bytes // 10)
        until_ms = random.choice((5_000, 30_000, None))
        if until_ms:
            world.after(until_ms, _take_memory, host, 0)
    elif kind:
        _cut(world, host, one_way=kind == "one way")


def _cut_power(world: World) -> None:
    """Everybody at once, and back one after the other."""
    world.note("the power is cut")
    for host in world.up():
        host.crash()
        world.after(15_000, _restart, host)


def _free(host: Host) -> None:
    host.disk.is_full = False


def _take_memory(host: Host, count_bytes: int) -> None:
    host.world.note(f"other programs take {count_bytes} bytes on {host.name}'s machine")
    for each in host.world.hosts:
        if each.machine_id == host.machine_id:
            each.greed_bytes = count_bytes


def _restart(host: Host) -> None:
    """What is still down when faults stop stays down."""
    if not host.is_up and host.world.now_ms < TROUBLE_MS:
        host.start()


def _cut(world: World, host: Host, *, one_way: bool) -> None:
    others = [other for other in world.hosts if other is not host and world.random.random() < 0.7]
    pairs = [(host.node_id, other.node_id) for other in others]
    pairs += [] if one_way else [(target, source) for source, target in pairs]
    world.note(f"{host.name} is cut from {len(others)} nodes" + (", one way" if one_way else ""))
    world.network.cuts.update(pairs)
    world.after(world.random.choice((2_000, 8_000, 35_000)), world.network.cuts.difference_update, pairs)


def _calm(world: World) -> None:
    world.heal()
    for host in world.hosts:
        return_ms = world.random.choice((0, RETURN_MS, None))
        if not host.is_up and return_ms is not None:
            world.at(world.now_ms + return_ms, _start, host)
    if not world.up():
        _start(world.hosts[0])


def _stay_quiet(world: World) -> None:
    """Where all is as it should be nobody does anything."""
    outer = world.observer

    def watch(host: Host | None, news: Input | str, effects: list[Effect]) -> None:
        if outer:
            outer(host, news, effects)
        for effect in effects:
            if host and _is_work(effect):
                raise Failure(f"{host.name}: all was well, and yet it did {type(effect).__name__}")

    world.observer = watch
    world.run_until(world.now_ms + QUIET_MS)
    world.observer = outer


def _is_work(effect: Effect) -> bool:
    if isinstance(effect, Publish | SendTo):
        return isinstance(effect.message, IntentUpdate)
    return isinstance(effect, StartRunner | RegroupRunner | StopRunner | StartFetch)
