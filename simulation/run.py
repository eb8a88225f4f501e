"""One run: faults for a minute, then calm, then everything must be well within a bound."""

import traceback
from collections.abc import Callable

from simulation.checks import BrokenPromiseError
from simulation.world import World

FAULTS_MS = 60_000
CALM_MS = 150_000  # the longest chain: time-out of a command, grace period, back-off of a fetch, three starts
SETTLE_STEP_MS = 5_000
START_SPREAD_MS = 3_000


class Verdict:
    """How one seed ended. `sentence` is empty where all was well."""

    def __init__(self, seed: int, world: World, sentence: str) -> None:
        self.seed = seed
        self.digest = world.digest()
        self.steps = world.steps
        self.now = world.now
        self.sentence = sentence

    def line(self) -> str:
        """The verdict, with what reproduces it."""
        if not self.sentence:
            return f"seed {self.seed}: passed, {self.steps} steps, digest {self.digest}"
        when = f"step {self.steps} (t={self.now / 1000:.1f} s)"
        again = f"python -m simulation --seed {self.seed} --seeds 1 --trace"
        return f"seed {self.seed}: FAILED at {when}: {self.sentence}; reproduce: {again}"


def run_seed(seed: int, trace: Callable[[str], None] | None = None) -> Verdict:
    """Plays one seed to its end, or to the first promise that is broken."""
    world = World(seed, trace)
    try:
        _faults(world)
        _calm(world)
    except BrokenPromiseError as broken:
        return Verdict(seed, world, str(broken))
    except Exception as raised:  # noqa: BLE001 (the top of a run: a machine that raises is a finding too)
        where = traceback.extract_tb(raised.__traceback__)[-1]
        return Verdict(seed, world, f"{type(raised).__name__}: {raised} ({where.name}, line {where.lineno})")
    return Verdict(seed, world, "")


def _faults(world: World) -> None:
    dice, faults, start = world.dice, world.faults, world.now
    for _ in range(faults.nodes):
        world.at(start + dice.randint(0, START_SPREAD_MS), lambda: _join(world))
    for _ in range(faults.late_nodes):
        world.at(start + dice.randint(START_SPREAD_MS, FAULTS_MS), lambda: _join(world))
    _every(world, faults.people_interval_ms, world.people.act)
    _every(world, faults.crash_interval_ms, lambda: _crash(world))
    _every(world, faults.leave_interval_ms, lambda: _leave(world))
    world.run_until(start + FAULTS_MS)


def _join(world: World) -> None:
    world.add_node()


def _every(world: World, interval_ms: int, action: Callable[[], None]) -> None:
    """Again and again, at irregular times, until the faults stop."""
    if interval_ms == 0:
        return

    def again() -> None:
        if not world.quiet:
            action()
            world.after(world.dice.randint(1, 2 * interval_ms), again)

    world.after(world.dice.randint(1, 2 * interval_ms), again)


def _crash(world: World) -> None:
    """The power of one node is cut; it comes back after a while."""
    running = [node for node in world.nodes.values() if node.alive]
    if running:
        node = world.dice.choice(running)
        node.crash()
        delay = world.dice.choice((100, 2_000, 10_000, 45_000))
        world.after(delay, lambda: None if node.alive or node.gone else node.start())


def _leave(world: World) -> None:
    staying = [node for node in world.nodes.values() if node.alive and not node.gone]
    if len(staying) > 1:
        world.leave(world.dice.choice(staying))


def _calm(world: World) -> None:
    """No more faults: everything must come true within `CALM_MS`."""
    world.quiet = True
    for node in world.nodes.values():
        if not node.alive and not node.gone:
            node.start()
    deadline = world.now + CALM_MS
    while True:
        world.run_until(world.now + SETTLE_STEP_MS)
        try:
            world.checks.all_is_well()
        except BrokenPromiseError:
            if world.now >= deadline:
                raise
        else:
            return
