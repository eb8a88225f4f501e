"""The world of one run: virtual time, nodes, a network, people, and the trace that makes a run's digest."""

import hashlib
import heapq
import random
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from covey.control.machine import Machine
from covey.control.settings import MachineSettings
from covey.schema.cluster import (
    Accepted,
    ClusterState,
    Command,
    CommandOutcome,
    DeleteInstance,
    Hardware,
    Instance,
    MeshMessage,
    PlaceModel,
)
from covey.schema.ids import InstanceId, ModelId, NodeId, RunnerId
from covey.schema.machine import (
    AnswerCommand,
    CancelFetch,
    CommandSubmitted,
    DeadlinePassed,
    Effect,
    FetchFailed,
    FetchFinished,
    FetchProgressed,
    HardwareProbed,
    Input,
    LeaveRequested,
    Left,
    MessageReceived,
    ModelsListed,
    Publish,
    RunnerExited,
    SendTo,
    Started,
    StartFetch,
    StartRunner,
    StateChanged,
    StopRunner,
    TellRunner,
)
from covey.schema.model import FileSource, ModelCard
from covey.schema.runner import Address
from simulation.checks import Checks
from simulation.faults import Faults, draw
from simulation.processes import Process

GIB = 1024**3
PROBE_INTERVAL_MS = 5_000
SETTINGS = MachineSettings(engine="fake")

_json = msgspec.json.Encoder(order="deterministic")


def model(name: str, gibibytes: int, layers: int) -> ModelCard:
    """A model of `gibibytes` in `layers` equal layers."""
    layer = gibibytes * GIB // layers
    return ModelCard(
        model_id=ModelId(name),
        source=FileSource(f"/models/{name}.gguf"),
        architecture="llama",
        quantization="Q4_1",
        layer_count=layers,
        hidden_size=512,
        attention_head_count=8,
        kv_head_count=2,
        head_size=64,
        feed_forward_size=1024,
        vocabulary_size=1000,
        context_length_max=2048,
        file_bytes=layer * layers,
        layer_bytes=(layer,) * layers,
        embedding_bytes=layer // 4,
        output_bytes=layer // 4,
    )


MODELS = (model("small", 1, 8), model("medium", 6, 24), model("huge", 500, 80))


class Node:
    """A device: its machine lives from start to crash; its id, its disk and its boot counter live on."""

    def __init__(self, world: "World", node_id: NodeId, memory_gibibytes: int) -> None:
        self.world = world
        self.node_id = node_id
        self.memory_bytes = memory_gibibytes * GIB
        self.boot = 0
        self.alive = False
        self.gone = False  # left for good
        self.machine: Machine
        self.processes: dict[RunnerId, Process] = {}
        self.fetches: dict[ModelId, int] = {}  # model -> attempt under way
        self.disk: set[ModelId] = set()
        self._wake_at: int | None = None

    def start(self) -> None:
        """The next life begins."""
        self.boot += 1
        self.alive = True
        self.machine = Machine(
            node_id=self.node_id, boot=self.boot, name=f"name-{self.node_id[:4]}", version="0.1.0", settings=SETTINGS
        )
        self.feed(Started())
        self.feed(ModelsListed(tuple(sorted(self.disk))))
        self._probe(self.boot)

    def crash(self) -> None:
        """The power is cut: no goodbye, and all its processes are gone with it."""
        self.alive = False
        processes, self.processes, self.fetches = list(self.processes.values()), {}, {}
        for process in processes:
            process.vanish()

    def _probe(self, boot: int) -> None:
        if self.alive and self.boot == boot:
            self.feed(HardwareProbed(self.hardware()))
            self.world.after(PROBE_INTERVAL_MS, lambda: self._probe(boot))

    def hardware(self) -> Hardware:
        """What the probe says. Free memory wobbles, as it does."""
        return Hardware(
            machine_id=self.node_id,
            machine_model="simulated",
            processor="simulated",
            physical_cores=4,
            logical_cores=4,
            os_name="Linux",
            os_version="1",
            memory_bytes_total=self.memory_bytes,
            memory_bytes_available=self.memory_bytes - self.world.dice.randint(GIB // 4, GIB),
            swap_bytes_total=0,
            swap_bytes_available=0,
            disk_bytes_total=1 << 40,
            disk_bytes_available=1 << 39,
        )

    def feed(self, given: Input) -> None:
        """One input into the machine; its effects are carried out, the checks look on."""
        world = self.world
        effects = self.machine.handle(world.now, given)
        world.record(self, given, effects)
        state = self.machine.state(world.now)
        world.checks.note_instances(state)
        for effect in effects:
            world.checks.before_effect(self, effect, state)
            self._carry_out(effect)
        if self.alive:
            world.checks.after_step(self, state)
            self._sleep()

    def _sleep(self) -> None:
        deadline = self.machine.deadline()
        self._wake_at = deadline
        if deadline is not None:
            boot = self.boot
            self.world.at(max(deadline, self.world.now), lambda: self._wake(boot, deadline))

    def _wake(self, boot: int, deadline: int) -> None:
        if self.alive and self.boot == boot and self._wake_at == deadline:
            self.feed(DeadlinePassed())

    def _carry_out(self, effect: Effect) -> None:  # noqa: C901 (one case for each effect)
        match effect:
            case Publish(message):
                self.world.publish(self, message)
            case SendTo(target, message):
                self.world.send(self, target, message)
            case AnswerCommand(command_id, outcome):
                self.world.people.answered(self, command_id, outcome)
            case StartFetch(card, attempt):
                self._fetch(card, attempt)
            case CancelFetch(model_id, attempt):
                if self.fetches.get(model_id) == attempt:
                    del self.fetches[model_id]
            case StartRunner(runner_id, attempt, spec):
                self.processes[runner_id] = Process(self.world, self, attempt, spec)
            case TellRunner(runner_id, attempt, command):
                process = self.processes.get(runner_id)
                if process is not None and process.attempt == attempt:
                    process.tell(command)
            case StopRunner(runner_id, attempt, _):
                self._stop_runner(runner_id, attempt)
            case Left():
                self.alive = False
            case StateChanged():
                pass

    def _stop_runner(self, runner_id: RunnerId, attempt: int) -> None:
        process = self.processes.get(runner_id)
        if process is not None and process.attempt == attempt:
            process.stop()
        else:  # it is gone already; saying so twice must do no harm
            boot = self.boot
            answer = RunnerExited(runner_id, attempt, "was not running", "")
            self.world.after(1, lambda: self.feed(answer) if self.alive and self.boot == boot else None)

    def _fetch(self, card: ModelCard, attempt: int) -> None:
        model_id, boot = card.model_id, self.boot
        self.fetches[model_id] = attempt
        duration = 1 if model_id in self.disk else self.world.dice.randint(1, self.world.faults.fetch_ms_max)

        def under_way() -> bool:
            return self.alive and self.boot == boot and self.fetches.get(model_id) == attempt

        def progress() -> None:
            if under_way():
                self.feed(FetchProgressed(model_id, attempt, card.file_bytes // 2, card.file_bytes))

        def finish() -> None:
            if not under_way():
                return
            del self.fetches[model_id]
            if model_id not in self.disk and self.world.unlucky(self.world.faults.fetch_failure_percent):
                self.feed(FetchFailed(model_id, attempt, "the hub was unlucky"))
            else:
                self.disk.add(model_id)
                self.feed(FetchFinished(model_id, attempt, f"/models/{model_id}.gguf", card.file_bytes))

        self.world.after(duration // 2, progress)
        self.world.after(duration, finish)


class People:
    """They place and delete models at any node, and remember what they were told."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.asked: dict[str, tuple[NodeId, int, int, Command]] = {}  # id -> (origin, its boot, when, what)
        self.outcomes: dict[str, CommandOutcome] = {}
        self.deleted: set[InstanceId] = set()

    def act(self) -> None:
        """Somebody wants something now."""
        nodes = [node for node in self.world.nodes.values() if node.alive]
        if not nodes:
            return
        dice = self.world.dice
        node = dice.choice(nodes)
        instances: list[Instance] = list(node.machine.state(self.world.now).instances)
        command: Command
        if instances and dice.random() < 0.4:
            command = DeleteInstance(dice.choice(instances).instance_id)
        elif dice.random() < 0.05:
            command = DeleteInstance(InstanceId("never-was"))
        else:
            command = PlaceModel(card=dice.choice(MODELS), node_count_min=dice.choice((1, 1, 2, 3)))
        self.submit(node, command)

    def submit(self, node: Node, command: Command) -> str:
        command_id = f"command-{len(self.asked)}"
        self.asked[command_id] = (node.node_id, node.boot, self.world.now, command)
        node.feed(CommandSubmitted(command_id, command))
        return command_id

    def answered(self, node: Node, command_id: str, outcome: CommandOutcome) -> None:
        self.world.checks.answer(node, command_id, outcome)
        self.outcomes[command_id] = outcome
        command = self.asked[command_id][3]
        if isinstance(command, DeleteInstance) and isinstance(outcome, Accepted):
            self.deleted.add(command.instance_id)


class World:
    """Everything outside the machines, driven by one seeded source of chance."""

    def __init__(self, seed: int, trace: Callable[[str], None] | None = None) -> None:
        self.dice = random.Random(seed)
        self.faults: Faults = draw(self.dice)
        self.now = 1_000_000
        self.steps = 0
        self.nodes: dict[NodeId, Node] = {}
        self.people = People(self)
        self.checks = Checks(self)
        self.quiet = False  # faults and people have stopped
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._order = 0
        self._port = 10_000
        self._digest = hashlib.sha256()
        self._trace = trace

    # ---- time ----

    def at(self, when_ms: int, action: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._queue, (when_ms, self._order, action))

    def after(self, delay_ms: int, action: Callable[[], None]) -> None:
        self.at(self.now + delay_ms, action)

    def run_until(self, when_ms: int) -> None:
        """Lets everything happen that is due until then."""
        while self._queue and self._queue[0][0] <= when_ms:
            self.now, _, action = heapq.heappop(self._queue)
            action()
        self.now = when_ms

    # ---- chance ----

    def unlucky(self, percent: int) -> bool:
        return not self.quiet and self.dice.randint(1, 100) <= percent

    # ---- nodes and network ----

    def add_node(self) -> Node:
        node_id = NodeId(hashlib.sha256(f"{self.dice.random()}".encode()).hexdigest()[:32])
        node = Node(self, node_id, self.dice.choice((4, 8, 16)))
        self.nodes[node_id] = node
        node.start()
        return node

    def publish(self, source: Node, message: MeshMessage) -> None:
        for node_id in self.nodes:
            if node_id != source.node_id:
                self.send(source, node_id, message)

    def send(self, source: Node, target: NodeId, message: MeshMessage) -> None:
        """On its way, unless it is lost; perhaps twice."""
        assert target != source.node_id, "a node sends to itself"
        copies = 1 + self.unlucky(self.faults.duplication_percent)
        for _ in range(copies):
            if not self.unlucky(self.faults.loss_percent):
                slowest = 5 if self.quiet else self.faults.delay_ms_max
                self.after(self.dice.randint(1, slowest), lambda: self._deliver(target, message))

    def _deliver(self, target: NodeId, message: MeshMessage) -> None:
        node = self.nodes.get(target)
        if node is not None and node.alive:
            node.feed(MessageReceived(message))

    def processes(self) -> Iterator[Process]:
        """All that are alive, in a fixed order."""
        for node in self.nodes.values():
            yield from [process for process in node.processes.values() if process.alive]

    def listening(self, address: Address) -> Process | None:
        return next((process for process in self.processes() if process.port == address.port), None)

    def next_port(self) -> int:
        self._port += 1
        return self._port

    # ---- trace ----

    def record(self, node: Node, given: Input, effects: list[Effect]) -> None:
        self.steps += 1
        self._digest.update(_json.encode([self.now, node.node_id, given, effects]))
        if self._trace is not None:
            self._trace(f"{self.now / 1000:10.3f} {node.node_id[:4]}/{node.boot} {summary(given)}")
            for effect in effects:
                self._trace(f"{'':20} -> {summary(effect)}")

    def digest(self) -> str:
        """Two runs with the same digest did the same, input by input."""
        return self._digest.hexdigest()[:16]

    def states(self) -> dict[NodeId, ClusterState]:
        return {node.node_id: node.machine.state(self.now) for node in self.nodes.values() if node.alive}

    def leave(self, node: Node) -> None:
        """An orderly end: the node is asked to go, and does not come back."""
        node.gone = True
        node.feed(LeaveRequested())


def summary(thing: Any) -> str:
    """One line for the trace."""
    text = repr(thing)
    return text if len(text) < 400 else text[:400] + "…"
