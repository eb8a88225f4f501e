"""A node that exists in memory only: snapshots of a small cluster, and answers written down beforehand."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import msgspec

from covey.api.backend import ListedModel
from covey.api.errors import RequestError
from covey.control import routing
from covey.control.activity import Activity
from covey.control.previewing import preview
from covey.schema.activity import ActivityPage
from covey.schema.cluster import (
    Accepted,
    ApiKey,
    ClusterState,
    Command,
    CommandOutcome,
    CommandResult,
    Hardware,
    Instance,
    InstanceStatus,
    Member,
    NodeReport,
    PlaceModel,
    Refused,
    RunnerReport,
    Stage,
    Visibility,
)
from covey.schema.generation import (
    FinishReason,
    GenerationEvent,
    GenerationFinished,
    GenerationRequest,
    GenerationStarted,
    PrefillProgressed,
    TextGenerated,
    Timings,
    Usage,
)
from covey.schema.ids import InstanceId, ModelId, NodeId, RequestId, RunnerId
from covey.schema.model import ModelCard, PackageSource, Shard
from covey.schema.runner import Address, RunnerState
from covey.schema.trust import RotationOutcome

FIRST, SECOND = NodeId("a" * 32), NodeId("b" * 32)
CARD = ModelCard(
    model_id=ModelId("Tiny-Chat"),
    source=PackageSource("tiny", "1.0", "0" * 64, "tiny.gguf", "0" * 64),
    architecture="llama",
    quantization="Q4_1",
    layer_count=4,
    hidden_size=64,
    attention_head_count=4,
    kv_head_count=2,
    head_size=16,
    feed_forward_size=128,
    vocabulary_size=300,
    context_length_max=2048,
    file_bytes=5_000_000,
    layer_bytes=(1_000_000,) * 4,
    embedding_bytes=500_000,
    output_bytes=500_000,
)
DRAFT = msgspec.structs.replace(
    CARD,
    model_id=ModelId("Tiny-Draft"),
    source=PackageSource("tiny", "1.0", "0" * 64, "draft.gguf", "0" * 64),
    layer_count=2,
    file_bytes=400_000,
    layer_bytes=(100_000,) * 2,
    embedding_bytes=100_000,
    output_bytes=100_000,
)
ANSWER: tuple[GenerationEvent, ...] = (
    GenerationStarted(RequestId("r1"), 7, 42),
    PrefillProgressed(7, 7),
    TextGenerated("Hello", (11,)),
    TextGenerated(", world – 🐦", (12, 13)),
    GenerationFinished(FinishReason.STOP, Usage(7, 4), Timings(1.0, 35.0, 60.0)),
)


def hardware(machine: str) -> Hardware:
    return Hardware(
        machine_id=machine,
        machine_model="Bench PC",
        processor="Test CPU",
        physical_cores=2,
        logical_cores=4,
        os_name="Linux",
        os_version="6.1",
        memory_bytes_total=8_000_000_000,
        memory_bytes_available=6_000_000_000,
        swap_bytes_total=0,
        swap_bytes_available=0,
        disk_bytes_total=100_000_000_000,
        disk_bytes_available=50_000_000_000,
        interfaces=(("lo", "127.0.0.1"),),
    )


def instance() -> Instance:
    stages = (
        Stage(RunnerId("run-1"), FIRST, Shard(0, 2, 4), 2_500_000),
        Stage(RunnerId("run-2"), SECOND, Shard(2, 4, 4), 2_500_000),
    )
    return Instance(
        instance_id=InstanceId("inst-1"),
        wish_id="wish-1",
        card=CARD,
        context_length=1024,
        slot_count=2,
        engine="fake",
        stages=stages,
    )


def runner(number: int, state: RunnerState, reason: str = "", retries_left: int = 0) -> RunnerReport:
    return RunnerReport(
        runner_id=RunnerId(f"run-{number}"),
        instance_id=InstanceId("inst-1"),
        state=state,
        attempt=1,
        data_address=Address("127.0.0.1", 50_000 + number),
        layers_loaded=1,
        layers_total=2,
        reason=reason,
        retries_left=retries_left,
    )


def member(node_id: NodeId, name: str, runners: tuple[RunnerReport, ...], **changes: object) -> Member:
    report = NodeReport(
        node_id=node_id,
        boot=1,
        sequence=5,
        name=name,
        version="0.1.0",
        api_address=Address("127.0.0.1", 52415 + len(name)),
        hardware=hardware(name),
        downloads=(),
        runners=runners,
        models_on_disk=(CARD.model_id,),
    )
    report = msgspec.structs.replace(report, **changes)
    return Member(node_id=node_id, visibility=Visibility.VISIBLE, heard_ms_ago=0, report=report)


def cluster(*states: RunnerState, revision: int = 7, reason: str = "", retries_left: int = 0) -> ClusterState:
    """Two nodes that hold one instance, if states of its two runners are given."""
    numbered = enumerate(states, start=1)
    runners = [(runner(number, state, reason, retries_left),) for number, state in numbered] or [(), ()]
    return ClusterState(
        node_id=FIRST,
        leader=FIRST,
        revision=revision,
        members=(member(FIRST, "anna", runners[0]), member(SECOND, "berta", runners[1])),
        wishes=(),
        instances=(instance(),) if states else (),
    )


@dataclass
class FakeBackend:
    """A node whose answers are written down beforehand, and which remembers what it was asked."""

    node_id: NodeId = FIRST
    current: ClusterState = field(default_factory=lambda: cluster(RunnerState.READY, RunnerState.READY))
    events: Sequence[GenerationEvent] = ANSWER
    outcome: CommandOutcome = field(default_factory=lambda: Accepted(InstanceId("inst-1")))
    commands: list[Command] = field(default_factory=list)
    requests: list[GenerationRequest] = field(default_factory=list)
    hang_after: int | None = None  # events, then silence until it is cancelled
    valid_keys: list[ApiKey] = field(default_factory=list)
    happened: Activity = field(default_factory=Activity)
    listed: list[ListedModel] = field(default_factory=lambda: [ListedModel(CARD, on_disk=True)])
    closed: int = 0  # generations that ended, however

    def state(self) -> ClusterState:
        return self.current

    def instance_status(self, instance: Instance) -> InstanceStatus:
        return routing.instance_status(self.current, instance)

    def keys(self) -> Sequence[ApiKey]:
        return self.valid_keys

    def activity(self, after: int, limit: int) -> ActivityPage:
        return self.happened.page(after, limit)

    async def wait_changed(self, revision: int, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while self.current.revision == revision:  # noqa: ASYNC110 - tests replace the snapshot freely
                    await asyncio.sleep(0.01)
        except TimeoutError:
            return

    async def resolve_model(self, name: str) -> ModelCard:
        card = next((each for each in (CARD, DRAFT) if each.model_id == name), None)
        if card is None:
            raise RequestError(f"There is no model '{name}'; listed are: {CARD.model_id}.", status=404, param="model")
        return card

    def models(self) -> Sequence[ListedModel]:
        return self.listed

    def preview(self, command: PlaceModel) -> Instance | Refused:
        return preview(self.current, command, "fake")

    async def submit(self, command: Command) -> CommandResult:
        self.commands.append(command)
        return CommandResult(f"command-{len(self.commands)}", self.outcome)

    async def rotate_code(self, proof: str, without: Sequence[NodeId]) -> RotationOutcome:
        if proof != "good":
            raise RequestError("That proves nothing.", status=403)
        reached = tuple(each for each in (FIRST, SECOND) if each not in without)
        return RotationOutcome(reached, missed=(), keys_revoked=("laptop",) if without else ())

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        self.requests.append(request)
        try:
            for number, event in enumerate(self.events):
                if number == self.hang_after:
                    await asyncio.sleep(3600)
                yield event
        finally:
            self.closed += 1
