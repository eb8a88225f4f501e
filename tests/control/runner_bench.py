"""One node's runners on a bench: what the world says to them is written by hand."""

from typing import Any

from msgspec.structs import replace

from covey.control.runner_table import Runner
from covey.control.runners import Runners, World
from covey.control.settings import MachineSettings
from covey.schema.cluster import Instance, NodeReport, RunnerReport, Stage
from covey.schema.ids import InstanceId, ModelId, NodeId, RunnerId
from covey.schema.machine import Effect, RunnerExited, RunnerSaid
from covey.schema.model import Shard
from covey.schema.runner import Address, Connected, Listening, Loaded, Ready, RunnerState
from simulation.people import SMALL

ME, OTHER = NodeId("me"), NodeId("other")
MINE, THEIRS = RunnerId("i.0"), RunnerId("i.1")


def instance(stage_count: int, memory_bytes: int = 100) -> Instance:
    cuts = [0, 3, 6] if stage_count == 2 else [0, 6]
    owners = [(MINE, ME), (THEIRS, OTHER)][:stage_count]
    stages = [
        Stage(runner_id, node_id, Shard(start, end, 6), memory_bytes)
        for (runner_id, node_id), start, end in zip(owners, cuts, cuts[1:], strict=False)
    ]
    return Instance(
        instance_id=InstanceId("i"),
        wish_id="w",
        card=SMALL,
        context_length=512,
        slot_count=1,
        engine="fake",
        stages=tuple(stages),
    )


def second() -> Instance:
    """Another instance on this node."""
    return replace(
        instance(1), instance_id=InstanceId("j"), stages=(replace(instance(1).stages[0], runner_id=RunnerId("j.0")),)
    )


class Bench:
    """One node's runners, with the other node's reports written by hand."""

    def __init__(self, stage_count: int = 1) -> None:
        self.runners = Runners(ME, 1, MachineSettings())
        self.instances = [instance(stage_count)]
        self.paths = {ModelId("small"): "/small.gguf"}
        self.other: NodeReport | None = None
        self.free_bytes: int | None = 1_000
        self.is_memory_fresh = True
        self.now_ms = 0

    def report(
        self,
        state: RunnerState,
        attempt: int,
        boot: int = 1,
        port: int | None = None,
        waiting: str = "",
        retries_left: int = 0,
    ) -> None:
        """What the other node says of its runner."""
        runner = RunnerReport(
            runner_id=THEIRS,
            instance_id=InstanceId("i"),
            state=state,
            attempt=attempt,
            data_address=Address("other", port) if port else None,
            waiting=waiting,
            retries_left=retries_left,
        )
        self.other = NodeReport(
            node_id=OTHER,
            boot=boot,
            sequence=1,
            name="other",
            version="1",
            api_address=None,
            hardware=None,
            downloads=(),
            runners=(runner,),
        )

    def advance(self, by_ms: int = 0) -> list[Effect]:
        self.now_ms += by_ms
        reports = {OTHER: self.other} if self.other else {}
        world = World(self.instances, reports, self.paths, self.free_bytes, self.is_memory_fresh)
        return self.runners.advance(self.now_ms, world)

    def say(self, message: Any, attempt: int = 1) -> list[Effect]:
        return self.hear(RunnerSaid(MINE, attempt, message))

    def hear(self, news: Any) -> list[Effect]:
        return [*self.runners.hear(self.now_ms, news), *self.advance()]

    def exit(self, attempt: int = 1) -> list[Effect]:
        """Its process is reaped, and the memory looked at without it."""
        effects = self.runners.hear(self.now_ms, RunnerExited(MINE, attempt, "exit status 1", "out of memory"))
        self.runners.measure({})
        return [*effects, *self.advance()]

    def until(self, state: RunnerState, attempt: int = 1) -> None:
        """Its process says what brings it there."""
        for message in (Listening(7), Connected(), Loaded(5), Ready()):
            if self.mine.state is not state:
                self.say(message, attempt)

    def until_ready(self, attempt: int = 1) -> None:
        self.until(RunnerState.READY, attempt)

    @property
    def mine(self) -> Runner:
        return self.runners.runners[MINE]
