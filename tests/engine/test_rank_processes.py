"""Runner processes that share layers: they answer as one would, and the loss of any ends the generation for all."""

import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from covey.engine import handshake
from covey.engine.contract import Piece
from covey.engine.fake import FakeStage
from covey.engine.greeting import LinkRefused, LinkWelcome, Purpose, RankHello
from covey.engine.handshake import receive_first
from covey.engine.link import Link
from covey.engine.linking import Linking
from covey.engine.mailbox import Linked, Mailbox
from covey.engine.port import DataPort, Reception
from covey.engine.tls import client_context
from covey.schema.generation import Broken, Ended, HeadEvent, Sampling, TokenSampled
from covey.schema.runner import (
    Address,
    Configure,
    Connected,
    ConnectTo,
    Listening,
    Load,
    Loaded,
    Parted,
    Ready,
    WarmUp,
)
from covey.schema.wire import pack
from tests.credentials import credentials
from tests.engine.harness import (
    HOST,
    Client,
    Runner,
    bring_ranks_up,
    expected_tokens,
    loaded,
    make_admit,
    make_rank_spec,
    make_spec,
    number_of,
    open_channel,
    rank_pipeline,
    sampled,
)
from tests.engine.ranks import memory_exchanges, side_by_side

SLOW = {"step_delay_ms": "20"}
TOKENS = np.array([5, 9, 200, 9, 9, 31, 0, 77], np.int64)
PIECES = (Piece(0, 0, 8, wants_logits=True),)


def is_token(event: HeadEvent) -> bool:
    return isinstance(event, TokenSampled)


def is_end(event: HeadEvent) -> bool:
    return isinstance(event, Ended | Broken)


def assert_serves(port: int) -> None:
    admit = make_admit("check", [1, 2, 3], 4)
    with Client(port) as client:
        client.send(admit)
        assert sampled(client.events_until(is_end)) == expected_tokens(admit)


# ---- the fake engine ----


@pytest.mark.parametrize("count", [2, 3, 5])
def test_ranks_of_the_fake_engine_answer_as_one(count: int) -> None:
    whole = loaded(make_spec()).run(PIECES, TOKENS)

    def run(exchange: Any) -> np.ndarray:
        stage = FakeStage()
        stage.load(make_spec(), lambda _: None, exchange)
        return stage.run(PIECES, TOKENS).copy()

    with memory_exchanges(count) as exchanges:
        first, *others = side_by_side(exchanges, run)
    assert (first == whole).all()
    assert all(len(other) == 0 for other in others)


class _Deaf:
    """An exchange that adds nothing up."""

    rank, count = 0, 2

    def add_up(self, values: np.ndarray) -> None:
        pass

    def join(self, values: np.ndarray) -> np.ndarray:
        return np.concatenate([values, values], axis=1)


def test_a_lost_sum_of_the_fake_engine_changes_the_answer() -> None:
    stage = FakeStage()
    stage.load(make_spec(), lambda _: None, _Deaf())
    assert (stage.run(PIECES, TOKENS) != loaded(make_spec()).run(PIECES, TOKENS)).any()


# ---- processes ----


@pytest.mark.parametrize(("rank_count", "stage_count"), [(2, 1), (3, 1), (2, 2)])
def test_any_number_of_ranks_gives_the_same_answers(rank_count: int, stage_count: int) -> None:
    """Six requests at once on four slots, with short and long prompts, greedy and not."""
    admits = [
        make_admit(
            f"r{number}",
            [(37 * number + place * place) % 256 for place in range(5 + 170 * number)],
            25,
            sampling=Sampling(temperature=0.9 * (number % 2), top_p=0.95, seed=42),
        )
        for number in range(6)
    ]
    with rank_pipeline(rank_count, stage_count) as (_, port), Client(port) as client:
        client.send(*admits)
        events = client.events_of_all([f"r{number}" for number in range(6)])
    for admit in admits:
        assert sampled(events[admit.request_id]) == expected_tokens(admit)


def begin_anew(runners: Sequence[Runner], rank_count: int) -> int:
    for place, runner in enumerate(runners):
        spec = make_rank_spec(place, rank_count, len(runners) // rank_count, generation=1)
        runner.tell(Configure(spec, credentials(number_of(spec))))
    return bring_ranks_up(runners, rank_count)[0]


@pytest.mark.timed
@pytest.mark.parametrize(("rank_count", "stage_count", "victim"), [(2, 1, 1), (3, 1, 2), (2, 2, 1), (2, 2, 3)])
def test_a_killed_rank_ends_the_generation_and_the_others_take_part_in_the_next(
    rank_count: int, stage_count: int, victim: int
) -> None:
    with rank_pipeline(rank_count, stage_count, engine_options=SLOW) as (runners, port), Client(port) as client:
        client.send(make_admit("r", [1, 2], 1000))
        client.events_until(is_token)
        started = time.monotonic()
        runners[victim].process.kill()
        last = client.events_until(is_end)[-1]
        assert isinstance(last, Broken)
        assert last.status == 503
        reasons = [runner.wait(Parted).reason for runner in runners if runner is not runners[victim]]
        assert time.monotonic() - started < 3
        assert not any("was closed here" in reason for reason in reasons)
        old, runners[victim] = runners[victim], Runner(make_rank_spec(victim, rank_count, stage_count, generation=1))
        old.close()
        runners[victim].wait(Listening)
        assert_serves(begin_anew(runners, rank_count))
        assert [runner.process.poll() for runner in runners] == [None] * len(runners)


@pytest.mark.timed
@pytest.mark.parametrize("victim", [1, 2])
def test_ranks_part_with_one_that_stands_still_within_seconds(victim: int) -> None:
    """The others wait for its part of a sum, in the middle of a step."""
    with rank_pipeline(3, engine_options=SLOW) as (runners, port), Client(port) as client:
        client.send(make_admit("r", [1, 2], 1000))
        client.events_until(is_token)
        started = time.monotonic()
        runners[victim].process.send_signal(signal.SIGSTOP)
        assert "gave no sign of life for 5 s" in runners[0].wait(Parted).reason
        assert isinstance(client.events_until(is_end)[-1], Broken)
        runners[3 - victim].wait(Parted)
        assert time.monotonic() - started < 9


def test_a_rank_that_cannot_compute_ends_the_step_for_all() -> None:
    """Its engine refuses what the others' take: here, a slot that it does not have."""
    with rank_pipeline_with_small_rank() as (runners, port), Client(port) as client:
        client.send(*(make_admit(f"r{number}", [1, 2], 1000) for number in range(2)))
        events = client.events_of_all(["r0", "r1"])
        assert all(isinstance(each[-1], Broken) for each in events.values())
        runners[0].wait(Parted)
        assert runners[1].wait_end() == 1


class rank_pipeline_with_small_rank:  # noqa: N801 - it stands where `rank_pipeline` does
    """Two ranks, of which the second was told of fewer slots."""

    def __enter__(self) -> tuple[list[Runner], int]:
        self.runners = [Runner(make_rank_spec(rank, 2, slot_count=4 - 3 * rank)) for rank in range(2)]
        return self.runners, bring_ranks_up(self.runners, 2)[0]

    def __exit__(self, *_: object) -> None:
        for runner in self.runners:
            runner.close()


def test_no_rank_is_ready_before_all_have_warmed_up() -> None:
    runners = [Runner(make_rank_spec(rank, 2)) for rank in range(2)]
    try:
        ports = [(Address(HOST, runner.wait(Listening).port),) for runner in runners]
        runners[0].tell(ConnectTo(ports[0], ports[0], tuple(ports)))
        runners[1].tell(ConnectTo((), (), tuple(ports)))
        for runner in runners:
            runner.wait(Connected)
            runner.tell(Load())
            runner.wait(Loaded)
        runners[0].tell(WarmUp())
        time.sleep(0.5)
        assert runners[0].process.poll() is None
        runners[1].tell(WarmUp())
        for runner in runners:
            runner.wait(Ready)
    finally:
        for runner in runners:
            runner.close()


@pytest.mark.parametrize(
    ("number", "first"),
    [
        (99, RankHello("instance-1", 0, 0, 0, 2, Purpose.SUMS)),  # a member, and none of the ranks
        (0, RankHello("instance-1", 0, 0, 0, 3, Purpose.STEPS)),
        (0, RankHello("instance-2", 0, 0, 0, 2, Purpose.STEPS)),
    ],
)
def test_another_node_is_no_rank(number: int, first: RankHello) -> None:
    runner = Runner(make_rank_spec(1, 2))
    try:
        channel = open_channel(runner.wait(Listening).port, number)
        channel.send(pack(first))
        answer = msgspec.msgpack.decode(receive_first(channel, time.monotonic() + 10), type=LinkWelcome | LinkRefused)
        channel.socket.close()
        assert isinstance(answer, LinkRefused)
    finally:
        runner.close()


def test_a_rank_whose_neighbour_never_comes_says_so() -> None:
    runner = Runner(make_rank_spec(1, 2, connect_ms=500))
    runner.wait(Listening)
    runner.tell(ConnectTo((), (), ((Address(HOST, 1),), (Address(HOST, 1),))))
    with pytest.raises(AssertionError, match="opened no link within"):
        runner.wait(Connected)
    runner.close()


# ---- who dials ----


class Ranks:
    """The runners of an instance in one process, of which some can't be reached by others."""

    def __init__(self, rank_count: int, stage_count: int) -> None:
        self.rank_count = rank_count
        self.specs = [make_rank_spec(place, rank_count, stage_count) for place in range(rank_count * stage_count)]
        self.ports = [DataPort(Reception(spec, credentials(place), Mailbox())) for place, spec in enumerate(self.specs)]
        self.linked: dict[int, Linked] = {}

    def link(self, hidden: Sequence[int]) -> None:
        threads = [threading.Thread(target=self._link, args=(place, hidden)) for place in range(len(self.ports))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _link(self, place: int, hidden: Sequence[int]) -> None:
        ways = [(Address(HOST, 1 if at in hidden else port.number),) for at, port in enumerate(self.ports)]
        begin = place // self.rank_count * self.rank_count
        after, before = ((begin + step) % len(ways) for step in (self.rank_count, -self.rank_count))
        told = ConnectTo(ways[after], ways[before], tuple(ways[begin : begin + self.rank_count]))
        context = client_context(credentials(place))
        self.linked[place] = Linking(self.specs[place], told, self.ports[place].reception, context).link()

    def close(self) -> None:
        for port in self.ports:
            port.close()


@pytest.mark.parametrize(
    ("rank_count", "stage_count", "hidden"), [(2, 1, []), (2, 1, [0]), (2, 1, [1]), (3, 1, [1]), (2, 2, [3])]
)
def test_all_ranks_come_to_their_links_whoever_can_dial(
    monkeypatch: pytest.MonkeyPatch, rank_count: int, stage_count: int, hidden: list[int]
) -> None:
    monkeypatch.setattr(handshake, "OFFER_SECONDS", 0.2)
    ranks = Ranks(rank_count, stage_count)
    ranks.link(hidden)
    for place, spec in enumerate(ranks.specs):
        linked = ranks.linked[place]
        others = [rank for rank in range(rank_count) if rank != spec.rank]
        assert sorted(linked.sums) == others
        assert len(linked.steps) == (len(others) if spec.rank == 0 else 0)
        assert (linked.before is None) is (spec.rank == 0 and stage_count == 1)
        assert (linked.after is None) is (spec.rank > 0 or stage_count == 1)
        for rank, link in linked.sums.items():
            talk(link, ranks.linked[place - spec.rank + rank].sums[spec.rank])
    ranks.close()


def talk(source: Link, target: Link) -> None:
    """What one says, the other hears: so they are both ends of one connection."""
    source.channel.send(b"sum")
    data = bytearray(3)
    target.channel.fill(memoryview(data))
    assert data == b"sum"
