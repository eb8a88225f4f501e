"""The people of the world: they place models, delete instances and files, give keys out, and wait for answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from covey.control.cluster import INSTANCE, KEY, WISH, wish_of
from covey.schema.cluster import (
    Accepted,
    AddKey,
    ApiKey,
    Command,
    CommandOutcome,
    DeleteInstance,
    PlaceModel,
    Rebalance,
    RevokeKey,
)
from covey.schema.ids import InstanceId, ModelId, NodeId
from covey.schema.model import HubSource, KvCacheType, ModelCard
from simulation.failure import Failure

if TYPE_CHECKING:
    from simulation.host import Host
    from simulation.world import World

MEGABYTE = 10**6


def card(name: str, layer_count: int, layer_bytes: int) -> ModelCard:
    """A model of so many equal layers."""
    return ModelCard(
        model_id=ModelId(name),
        source=HubSource("owner/repository", f"{name}.gguf"),
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


NAMES = ("ann", "ben", "cora")


def subject(command: Command, outcome: Accepted) -> str:
    """The key of what an accepted command has written or deleted."""
    return (KEY if isinstance(command, AddKey | RevokeKey) else INSTANCE) + outcome.effect_id


def lasting(command: Command, outcome: Accepted) -> str:
    """The same, but of an instance its wish: that stays when the leader assigns it elsewhere."""
    if isinstance(command, AddKey | RevokeKey):
        return subject(command, outcome)
    return WISH + wish_of(InstanceId(outcome.effect_id))


def is_creation(command: Command) -> bool:
    return isinstance(command, PlaceModel | Rebalance | AddKey)


class People:
    """Asks at any node that is up. `answers` keeps every outcome."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.asked: dict[str, Command] = {}
        self.answers: dict[str, CommandOutcome] = {}
        self.ended: dict[str, None] = {}  # keys of wishes and API keys that somebody asked to end

    def place(
        self,
        host: Host,
        model: ModelCard,
        node_count_min: int = 1,
        node_ids: tuple[NodeId, ...] = (),
        rank_count: int = 1,
        draft: ModelCard | None = None,
        kv_cache: KvCacheType = KvCacheType.F32,
    ) -> str:
        command = PlaceModel(
            card=model, node_count_min=node_count_min, node_ids=node_ids, rank_count=rank_count, draft=draft,
            kv_cache=kv_cache,
        )  # fmt: skip
        return self._ask(host, command)

    def delete(self, host: Host, instance_id: InstanceId) -> str:
        self.ended[WISH + wish_of(instance_id)] = None
        return self._ask(host, DeleteInstance(instance_id))

    def rebalance(self, host: Host, instance_id: InstanceId) -> str:
        return self._ask(host, Rebalance(instance_id))

    def add_key(self, host: Host, name: str) -> str:
        key_id = f"{len(self.asked):012x}"
        return self._ask(host, AddKey(ApiKey(key_id=key_id, name=name, salt=b"", digest=b"", created_s=0)))

    def revoke_key(self, host: Host, key_id: str) -> str:
        self.ended[KEY + key_id] = None
        return self._ask(host, RevokeKey(key_id))

    def act(self, host: Host) -> None:
        """Something at random."""
        what = self.world.random.random()
        if what < 0.1:
            self._change_keys(host)
        elif what < 0.2:
            host.lose_file()
        else:
            self._change_models(host)

    def _change_keys(self, host: Host) -> None:
        assert host.machine is not None
        keys = host.machine.keys()
        if keys and self.world.random.random() < 0.5:
            self.revoke_key(host, self.world.random.choice(keys).key_id)
        else:
            self.add_key(host, self.world.random.choice(NAMES))

    def _change_models(self, host: Host) -> None:
        random = self.world.random
        assert host.machine is not None
        instances = list(host.machine.cluster.instances)
        wanted = random.random()
        if instances and wanted < 0.4:
            self.delete(host, random.choice(instances))
        elif instances and wanted < 0.5:
            self.rebalance(host, random.choice(instances))
        else:
            model, count = random.choice((SMALL, SMALL, LARGE, LARGE, HUGE)), random.choice((1, 1, 1, 2, 2, 3))
            chosen = random.sample(self.world.hosts, random.randint(1, len(self.world.hosts)))
            node_ids = tuple(each.node_id for each in chosen) if random.random() < 0.25 else ()
            ranks = random.choice((1, 1, 2))
            draft = SMALL if model is not SMALL and random.random() < 0.3 else None
            count = random.choice((1, 2, 4)) if ranks == 2 else count
            kv_cache = random.choice((KvCacheType.F32, KvCacheType.F32, KvCacheType.F16))
            self.place(host, model, count, node_ids, ranks, draft, kv_cache)

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
