"""The people of the world: they place models, delete instances, and wait for answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from covey.control.cluster import wish_of
from covey.schema.cluster import Command, CommandOutcome, DeleteInstance, PlaceModel
from covey.schema.ids import InstanceId, ModelId, NodeId
from covey.schema.model import FileSource, ModelCard
from simulation.failure import Failure

if TYPE_CHECKING:
    from simulation.host import Host
    from simulation.world import World

MEGABYTE = 10**6


def card(name: str, layer_count: int, layer_bytes: int) -> ModelCard:
    """A model of so many equal layers."""
    return ModelCard(
        model_id=ModelId(name),
        source=FileSource(f"/models/{name}"),
        architecture="llama",
        quantization="Q4_1",
        layer_count=layer_count,
        hidden_size=64,
        attention_head_count=4,
        kv_head_count=2,
        head_size=16,
        feed_forward_size=256,
        vocabulary_size=1000,
        context_length_max=4096,
        file_bytes=layer_count * layer_bytes + 20 * MEGABYTE,
        layer_bytes=(layer_bytes,) * layer_count,
        embedding_bytes=12_500_000,
        output_bytes=12_500_000,
    )


SMALL = card("small", 6, 12_500_000)
LARGE = card("large", 24, 125 * MEGABYTE)
HUGE = card("huge", 40, 2_500 * MEGABYTE)


class People:
    """Asks at any node that is up. `answers` keeps every outcome."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.asked: dict[str, Command] = {}
        self.answers: dict[str, CommandOutcome] = {}
        self.deletions: dict[str, list[str]] = {}  # by wish id: the commands that would delete it

    def place(self, host: Host, model: ModelCard, node_count_min: int = 1, node_ids: tuple[NodeId, ...] = ()) -> str:
        return self._ask(host, PlaceModel(card=model, node_count_min=node_count_min, node_ids=node_ids))

    def delete(self, host: Host, instance_id: InstanceId) -> str:
        command_id = self._ask(host, DeleteInstance(instance_id))
        self.deletions.setdefault(wish_of(instance_id), []).append(command_id)
        return command_id

    def act(self, host: Host) -> None:
        """Something at random."""
        random = self.world.random
        assert host.machine is not None
        instances = list(host.machine.cluster.instances)
        if instances and random.random() < 0.4:
            self.delete(host, random.choice(instances))
        else:
            model, count = random.choice((SMALL, SMALL, LARGE, LARGE, HUGE)), random.choice((1, 1, 1, 2, 2, 3))
            chosen = random.sample(self.world.hosts, random.randint(1, len(self.world.hosts)))
            node_ids = tuple(each.node_id for each in chosen) if random.random() < 0.25 else ()
            self.place(host, model, count, node_ids)

    def hear_answer(self, command_id: str, outcome: CommandOutcome) -> None:
        if command_id in self.answers:
            raise Failure(f"command {command_id} was answered twice: {self.answers[command_id]} and {outcome}")
        self.answers[command_id] = outcome

    def _ask(self, host: Host, command: Command) -> str:
        command_id = f"c{len(self.asked) + 1}"
        self.asked[command_id] = command
        host.submit(command_id, command)
        return command_id

    def waiting(self) -> list[str]:
        """Commands without an answer, asked at a life of a node that still goes on."""
        return [command_id for host in self.world.up() for command_id in host.safety.waiting]
