"""Runner processes as the world sees them: they listen, link, load, warm up, and sometimes die."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from covey.schema.ids import RunnerId
from covey.schema.machine import Input, RunnerExited, RunnerSaid, RunnerStarted
from covey.schema.runner import (
    Address,
    Connected,
    ConnectTo,
    Listening,
    Load,
    Loaded,
    LoadProgressed,
    PhaseFailed,
    Ready,
    RunnerCommand,
    RunnerMessage,
    RunnerSpec,
    ShutDown,
    WarmUp,
)

if TYPE_CHECKING:
    from simulation.world import Node, World

CONNECT_TIMEOUT_MS = 20_000
BROKEN_LINK_NOTICED_MS = 20


class Process:
    """One runner process. `port` is unique in the world, so it tells one life of a runner from the next."""

    def __init__(self, world: "World", node: "Node", attempt: int, spec: RunnerSpec) -> None:
        self.world = world
        self.node = node
        self.runner_id: RunnerId = spec.runner_id
        self.attempt = attempt
        self.spec = spec
        self.port = world.next_port()
        self.alive = True
        self.target: Process | None = None  # the next stage, once the link to it is open
        self.connected = False
        world.after(world.dice.randint(50, 400), self.when_alive(self._start))

    def when_alive(self, action: Callable[[], None]) -> Callable[[], None]:
        return lambda: action() if self.alive else None

    def _start(self) -> None:
        self._input(RunnerStarted(self.runner_id, self.attempt, self.port))
        self._reach(Listening(self.port))

    def _input(self, message: Input) -> None:
        if self.node.alive and self.node.processes.get(self.runner_id) is self:
            self.node.feed(message)

    def _say(self, message: RunnerMessage) -> None:
        self._input(RunnerSaid(self.runner_id, self.attempt, message))

    def _reach(self, message: RunnerMessage) -> None:
        """Ends a phase with `message`, or dies of it."""
        if self.world.unlucky(self.world.faults.runner_exit_percent):
            self.fail(type(message).__name__)
        else:
            self._say(message)

    def tell(self, command: RunnerCommand) -> None:
        """What the node wrote to the standard input of this process."""
        later = self.world.dice.randint(1, 300)
        match command:
            case ConnectTo(address):
                deadline = self.world.now + CONNECT_TIMEOUT_MS
                self.world.after(1, self.when_alive(lambda: self._connect(address, deadline)))
            case Load():
                total = self.spec.shard.layer_end - self.spec.shard.layer_start
                self.world.after(later, self.when_alive(lambda: self._say(LoadProgressed(1, total, 1, total))))
                self.world.after(later * 2, self.when_alive(lambda: self._reach(Loaded(1))))
            case WarmUp():
                self.world.after(later, self.when_alive(lambda: self._reach(Ready())))
            case ShutDown():
                self.stop()
            case _:
                raise AssertionError(command)

    def _connect(self, address: Address, deadline: int) -> None:
        """Tries until the next stage listens there, as a real runner does, and gives up at the deadline."""
        found = self.world.listening(address)
        if found is not None:
            self.target = found
            self._linked()
            found.when_alive(found._linked)()  # noqa: SLF001 (its neighbour's link has come)
        elif self.world.now >= deadline:
            self.fail("connect")
        else:
            self.world.after(250, self.when_alive(lambda: self._connect(address, deadline)))

    def _linked(self) -> None:
        before = [p for p in self.world.processes() if p.target is self]
        if self.target is not None and before and not self.connected:
            self.connected = True
            self._reach(Connected())

    def fail(self, phase: str) -> None:
        """The process reports why, and ends by itself."""
        self._say(PhaseFailed(phase, f"the {phase} phase was unlucky"))
        self._die("exit status 1")

    def stop(self) -> None:
        """Ends in an orderly way after a moment."""
        self.world.after(self.world.dice.randint(1, 500), self.when_alive(lambda: self._die("exit status 0")))

    def vanish(self) -> None:
        """Its node crashed: gone without a word."""
        self.alive = False
        self._break_links()

    def _die(self, description: str) -> None:
        self.alive = False
        self._break_links()
        if self.node.processes.get(self.runner_id) is self:
            del self.node.processes[self.runner_id]
            self.node.feed(RunnerExited(self.runner_id, self.attempt, description, "last words"))

    def _break_links(self) -> None:
        for process in self.world.processes():
            linked = process.target is self or self.target is process
            if process is not self and linked and process.connected:
                self.world.after(BROKEN_LINK_NOTICED_MS, process.when_alive(lambda p=process: p.fail("link")))
