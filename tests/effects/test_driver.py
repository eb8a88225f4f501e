"""The driver between a machine and the world, both played by fakes."""

import logging
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import UnionType

import anyio
import pytest

from covey.effects.driver import Driver
from covey.effects.fetching import FetchError
from covey.effects.mailbox import Mailbox
from covey.effects.store import Restored, StoreError
from covey.schema.cluster import (
    Accepted,
    ApiKey,
    ClusterState,
    CommandResult,
    DeleteInstance,
    Entry,
    Heartbeat,
    MeshMessage,
    Refused,
    Version,
)
from covey.schema.ids import InstanceId, ModelId, NodeId, RunnerId
from covey.schema.machine import (
    AnswerCommand,
    CancelFetch,
    CommandSubmitted,
    DeadlinePassed,
    Effect,
    EntriesKept,
    FetchFailed,
    FetchFinished,
    FetchProgressed,
    Input,
    KeepEntries,
    KeepingFailed,
    LeaveRequested,
    Left,
    ModelsListed,
    Publish,
    SendTo,
    Started,
    StartFetch,
    StateChanged,
    StopRunner,
)
from covey.schema.model import FileSource, ModelCard

pytestmark = pytest.mark.anyio

ME = NodeId("0" * 32)
ENTRY = Entry(b"\xa1x", Version(1, ME))
BEAT = Heartbeat(ME, 1, 1, (), None, "")
CARD = ModelCard(
    model_id=ModelId("m"),
    source=FileSource("/m.gguf"),
    architecture="llama",
    quantization="F16",
    layer_count=1,
    hidden_size=1,
    attention_head_count=1,
    kv_head_count=1,
    head_size=1,
    feed_forward_size=1,
    vocabulary_size=1,
    context_length_max=1,
    file_bytes=10,
    layer_bytes=(1,),
    embedding_bytes=1,
    output_bytes=1,
)


class FakeMachine:
    """Answers each input as `rules` says; remembers what came."""

    def __init__(self, rules: Callable[[Input], list[Effect]]) -> None:
        self.rules = rules
        self.inputs: list[Input] = []
        self.deadline_ms: int | None = None
        self.revision = 0

    def handle(self, now_ms: int, news: Input) -> list[Effect]:  # noqa: ARG002 - the real one's shape
        self.inputs.append(news)
        if isinstance(news, DeadlinePassed):
            self.deadline_ms = None
        return [Left()] if isinstance(news, LeaveRequested) else self.rules(news)

    def deadline(self) -> int | None:
        return self.deadline_ms

    def state(self, now_ms: int) -> ClusterState:  # noqa: ARG002 - the real one's shape
        return ClusterState(node_id=ME, leader=None, revision=self.revision, members=(), wishes=(), instances=())

    def keys(self) -> tuple[ApiKey, ...]:
        return ()


class World:
    """Mesh, runners, models and store in one: remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[object] = []
        self.release = anyio.Event()
        self.fetch_error: FetchError | None = None
        self.restored = Restored({"wish/old": ENTRY}, 3)
        self.disk_error: StoreError | None = None

    def publish(self, message: MeshMessage) -> None:
        self.asked.append(("publish", message))

    def send_to(self, target: NodeId, message: MeshMessage) -> None:
        self.asked.append((target, message))

    def start(self, effect: object) -> None:
        self.asked.append(effect)

    tell = stop = start

    def keep(self, entries: Mapping[str, Entry | None]) -> None:
        self.asked.append((threading.current_thread() is threading.main_thread(), entries))
        if self.disk_error:
            raise self.disk_error

    async def ensure(self, card: ModelCard, progress: Callable[[int, int], None]) -> Path:  # noqa: ARG002
        self.asked.append("ensure")
        progress(4, 10)
        await self.release.wait()
        if self.fetch_error:
            raise self.fetch_error
        return Path("/m.gguf")


class Clock:
    now_ms = 0

    def __call__(self) -> int:
        return self.now_ms


class Rig:
    def __init__(self, rules: Callable[[Input], list[Effect]]) -> None:
        self.machine, self.world, self.mailbox, self.clock = FakeMachine(rules), World(), Mailbox(), Clock()
        self.driver = Driver(
            self.machine, self.mailbox, self.world, self.world, self.world, clock=self.clock, command_prefix="me-1"
        )

    async def wait_input(self, kind: type | UnionType, count: int = 1) -> Input:
        """The input of this kind that is the `count`-th."""
        with anyio.fail_after(5):
            while True:
                found = [item for item in self.machine.inputs if isinstance(item, kind)]
                if len(found) >= count:
                    return found[count - 1]
                await anyio.sleep(0.002)


@asynccontextmanager
async def driving(rules: Callable[[Input], list[Effect]]) -> AsyncGenerator[Rig]:
    rig = Rig(rules)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.driver.run, lambda _: rig.world)
        yield rig
        await rig.driver.leave()
    rig.mailbox.close()


async def test_effects_reach_their_part_of_the_world_in_order() -> None:
    stop = StopRunner(RunnerId("r"), 1, 10)
    effects = [Publish(BEAT), SendTo(NodeId("b"), BEAT), stop]
    async with driving(lambda item: effects if isinstance(item, Started) else []) as rig:
        await rig.wait_input(Started)
    assert rig.world.asked == [("publish", BEAT), ("b", BEAT), stop]
    assert rig.machine.inputs == [Started({"wish/old": ENTRY}, 3), LeaveRequested()]


async def test_a_command_gets_the_answer_of_its_own_id() -> None:
    def rules(item: Input) -> list[Effect]:
        match item:
            case CommandSubmitted(command_id, DeleteInstance(instance_id)):
                return [
                    AnswerCommand("unknown", Refused("not you")),
                    AnswerCommand(command_id, Accepted(instance_id)),
                ]
        return []

    async with driving(rules) as rig:
        results = [await rig.driver.submit(DeleteInstance(InstanceId(name))) for name in ("a", "b")]
    ids = [item.command_id for item in rig.machine.inputs if isinstance(item, CommandSubmitted)]
    assert ids == ["me-1-1", "me-1-2"]
    assert results == [
        CommandResult(ids[0], Accepted(InstanceId("a"))),
        CommandResult(ids[1], Accepted(InstanceId("b"))),
    ]


async def test_who_still_waits_when_the_node_leaves_is_told() -> None:
    outcomes: list[object] = []
    async with anyio.create_task_group() as tasks, driving(lambda _: []) as rig:

        async def ask() -> None:
            outcomes.append((await rig.driver.submit(DeleteInstance(InstanceId("a")))).outcome)

        tasks.start_soon(ask)
        await rig.wait_input(CommandSubmitted)
    outcomes.append((await rig.driver.submit(DeleteInstance(InstanceId("a")))).outcome)
    assert [outcome.status for outcome in outcomes if isinstance(outcome, Refused)] == [503, 503]


async def test_it_sleeps_until_the_deadline_and_no_longer() -> None:
    rig = Rig(lambda _: [])
    rig.machine.deadline_ms = 30
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.driver.run, lambda _: rig.world)
        await rig.wait_input(DeadlinePassed)
        await anyio.sleep(0.05)
        await rig.driver.leave()
    rig.mailbox.close()
    assert rig.machine.inputs == [Started({"wish/old": ENTRY}, 3), DeadlinePassed(), LeaveRequested()]


async def test_clients_wait_for_a_change_of_the_state() -> None:
    async with driving(lambda item: [StateChanged()] if isinstance(item, ModelsListed) else []) as rig:
        await rig.wait_input(Started)
        start = anyio.current_time()
        await rig.driver.wait_changed(0, 0.05)
        assert 0.04 < anyio.current_time() - start < 2
        rig.machine.revision = 7
        await rig.mailbox.put(ModelsListed(()))
        with anyio.fail_after(2):
            await rig.driver.wait_changed(0, 60)
        assert rig.driver.state().revision == 7
        with anyio.fail_after(2):
            await rig.driver.wait_changed(3, 60)  # it differs already


async def test_a_snapshot_ages() -> None:
    """`heard_ms_ago` grows although nothing happens."""
    async with driving(lambda _: []) as rig:
        await rig.wait_input(Started)
        first = rig.driver.state()
        assert rig.driver.state() is first
        rig.clock.now_ms += 501
        assert rig.driver.state() is not first


def fetching(item: Input) -> list[Effect]:
    return [StartFetch(CARD, 3), StartFetch(CARD, 3)] if isinstance(item, Started) else []


async def test_a_fetch_reports_and_ends_once() -> None:
    async with driving(fetching) as rig:
        assert await rig.wait_input(FetchProgressed) == FetchProgressed(ModelId("m"), 3, 4, 10)
        rig.world.release.set()
        assert await rig.wait_input(FetchFinished) == FetchFinished(ModelId("m"), 3, "/m.gguf", 10)
    assert rig.world.asked == ["ensure"]


async def test_a_fetch_that_fails_comes_back_as_a_sentence() -> None:
    async with driving(fetching) as rig:
        rig.world.fetch_error = FetchError("no network")
        rig.world.release.set()
        assert await rig.wait_input(FetchFailed) == FetchFailed(ModelId("m"), 3, "no network")


async def test_a_cancelled_fetch_is_not_answered() -> None:
    def rules(item: Input) -> list[Effect]:
        if isinstance(item, ModelsListed):
            return [CancelFetch(ModelId("m"), 3), CancelFetch(ModelId("other"), 1)]
        return fetching(item)

    async with driving(rules) as rig:
        await rig.wait_input(FetchProgressed)
        await rig.mailbox.put(ModelsListed(()))
        await rig.wait_input(ModelsListed)
        await anyio.sleep(0.01)
        rig.world.release.set()
        await anyio.sleep(0.02)
    assert not [item for item in rig.machine.inputs if isinstance(item, FetchFinished | FetchFailed)]


async def test_a_full_mailbox_says_so_and_keeps_what_may_wait(caplog: pytest.LogCaptureFixture) -> None:
    mailbox = Mailbox(2)
    with caplog.at_level(logging.WARNING):
        assert [mailbox.offer(ModelsListed(())) for _ in range(5)] == [True, True, False, False, False]
    assert mailbox.dropped_count == 3
    assert len(caplog.records) == 1
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(mailbox.put, LeaveRequested())
        items = [await mailbox.take(1) for _ in range(3)]
    assert items[-1] == LeaveRequested()
    assert await mailbox.take(0.01) is None
    mailbox.close()


# ---- intent ----


async def test_intent_goes_to_the_disk_in_a_thread_and_the_machine_hears_how_that_went(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The disk fills up, and later there is room again: one line in the log, an answer each time."""

    def rules(item: Input) -> list[Effect]:
        match item:
            case CommandSubmitted(command_id):
                return [
                    AnswerCommand(command_id, Refused("")),
                    KeepEntries({"k": ENTRY, "l": None}, int(command_id[-1])),
                ]
        return []

    async with driving(rules) as rig:
        for count, error in enumerate((None, StoreError("full"), StoreError("full"), None), start=1):
            rig.world.disk_error = error
            await rig.driver.submit(DeleteInstance(InstanceId("a")))
            await rig.wait_input(EntriesKept | KeepingFailed, count)
    answers = [item for item in rig.machine.inputs if isinstance(item, EntriesKept | KeepingFailed)]
    assert answers == [EntriesKept(1), KeepingFailed(2, "full"), KeepingFailed(3, "full"), EntriesKept(4)]
    assert rig.world.asked == [(False, {"k": ENTRY, "l": None})] * 4
    assert [record.getMessage() for record in caplog.records] == ["full"]
