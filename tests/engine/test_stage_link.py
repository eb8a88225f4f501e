"""Steps arrive over a link as they were sent, and whatever else arrives is the guilty side's error."""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import numpy as np
import pytest

from covey.engine import handshake
from covey.engine import link as link_module
from covey.engine import port as port_module
from covey.engine.connection import BACKLOG_BYTES_MAX, ServeConnection
from covey.engine.contract import Piece
from covey.engine.greeting import (
    Greeting,
    LinkHello,
    LinkOffer,
    LinkRefused,
    LinkWelcome,
    Neighbour,
    Purpose,
    RankHello,
    RankOffer,
    refusal,
    stage_after,
    stage_before,
)
from covey.engine.handshake import Dialler, LinkRefusedError, receive_first
from covey.engine.link import DTYPES, Link, LinkBrokenError, LinkClosedError, Opening
from covey.engine.link_place import LinkPlace
from covey.engine.mailbox import Mailbox
from covey.engine.plan import SamplingStart, StepOutcome, StepPlan
from covey.engine.port import DataPort, Reception
from covey.engine.tls import Channel, client_context, server_context
from covey.schema.generation import Prefilled, Sampling
from covey.schema.ids import RequestId
from covey.schema.runner import Address, RunnerSpec
from covey.schema.wire import FrameTooLargeError, pack
from tests.credentials import credentials, node
from tests.engine.harness import HOST, channel_pair, make_spec

DIALLER = Dialler(client_context(credentials(0)))
PLAN = StepPlan(
    7,
    (Piece(1, 256, 3, wants_logits=True), Piece(0, 5, 1, wants_logits=False)),
    (SamplingStart(1, Sampling(temperature=0.5, seed=2**64 - 1), (1, 2, 3), (4,)),),
    (2, 3),
)


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server((HOST, 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    far.settimeout(10)
    yield near, far
    near.close()
    far.close()


@pytest.fixture
def channels(sockets: tuple[socket.socket, socket.socket]) -> tuple[Channel, Channel]:
    near, far = channel_pair(*sockets)
    far.socket.settimeout(10)
    return near, far


@pytest.fixture
def links(channels: tuple[Channel, Channel]) -> Iterator[tuple[Link, Link]]:
    sender, receiver = Link(channels[0], "stage 1"), Link(channels[1], "stage 0")
    yield sender, receiver
    sender.close()
    receiver.close()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", [(1, 8), (0, 8), (256, 576)])
def test_numbers_of_all_types_arrive(
    links: tuple[Link, Link], dtype: np.dtype[np.generic], shape: tuple[int, int]
) -> None:
    sender, receiver = links
    values = (np.arange(np.prod(shape)) % 2000).reshape(shape).astype(dtype)
    thread = threading.Thread(target=sender.send, args=(PLAN, values))
    thread.start()
    frame = receiver.receive()
    thread.join()
    assert frame.message == PLAN
    assert frame.values is not None
    assert (frame.values.dtype, frame.values.shape) == (dtype, shape)
    assert frame.values.tobytes() == values.tobytes()


def test_a_foreign_byte_order_or_layout_is_straightened(links: tuple[Link, Link]) -> None:
    sender, receiver = links
    values = np.arange(12, dtype=">f4").reshape(3, 4).T
    sender.send(PLAN, values)
    received = receiver.receive().values
    assert received is not None
    assert received.dtype == np.dtype("<f4")
    assert (received == values).all()


def test_a_type_without_a_name_is_our_mistake(links: tuple[Link, Link]) -> None:
    with pytest.raises(TypeError, match="float64"):
        links[0].send(PLAN, np.zeros((1, 2)))


def test_outcomes_arrive_in_order(links: tuple[Link, Link]) -> None:
    sender, receiver = links
    outcomes = [StepOutcome(1, (5, None, 7), "It overflowed."), StepOutcome(2, ())]
    for outcome in outcomes:
        sender.send(outcome)
    assert [receiver.receive().message for _ in outcomes] == outcomes


def test_the_side_that_closed_is_told_apart(links: tuple[Link, Link]) -> None:
    sender, receiver = links
    sender.close()
    with pytest.raises(LinkClosedError, match="stage 1 was closed here"):
        sender.send(PLAN, np.zeros((1, 2), np.float32))
    with pytest.raises(LinkBrokenError, match="stage 0 is lost"):
        receiver.receive()


def test_sending_to_one_who_left_breaks(links: tuple[Link, Link]) -> None:
    sender, receiver = links
    receiver.close()

    def send_for_a_while() -> None:
        for _ in range(100):
            sender.send(PLAN, np.zeros((64, 576), np.float32))

    with pytest.raises(LinkBrokenError, match="stage 1"):
        send_for_a_while()


@pytest.mark.timed
def test_the_end_of_a_link_that_only_sends_is_noticed(links: tuple[Link, Link]) -> None:
    sender, receiver = links
    threading.Timer(0.05, receiver.close).start()
    started = time.monotonic()
    assert isinstance(sender.wait_end(), LinkBrokenError)
    assert time.monotonic() - started < 2


def test_a_pulse_keeps_a_link_whose_steps_take_long(links: tuple[Link, Link], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "PULSE_SILENCE_SECONDS", 0.5)
    sender, receiver = links
    ends: list[Exception] = []
    waits = threading.Thread(target=lambda: ends.append(sender.wait_end()))
    waits.start()
    for _ in range(8):
        receiver.pulse()
        time.sleep(0.1)
    assert ends == []
    waits.join(2)
    assert "gave no sign of life" in str(ends[0])
    assert isinstance(ends[0], LinkBrokenError)


def junk_length() -> bytes:
    return b"\xff\xff\xff\xff"


def junk_body() -> bytes:
    return b"\x05\x00\x00\x00hello"


def junk_type() -> bytes:
    return pack(Opening(PLAN, "complex", (1,)))


def junk_shape() -> bytes:
    return pack(Opening(PLAN, "float32", (-1, 4)))


def junk_size() -> bytes:
    return pack(Opening(PLAN, "float32", (1 << 20, 1 << 20)))


@pytest.mark.parametrize("junk", [junk_length, junk_body, junk_type, junk_shape, junk_size])
def test_nonsense_breaks_the_link(channels: tuple[Channel, Channel], junk: Callable[[], bytes]) -> None:
    receiver = Link(channels[1], "stage 0")
    channels[0].send(junk())
    with pytest.raises(LinkBrokenError, match="stage 0 is lost"):
        receiver.receive()
    receiver.close()


def test_a_step_cut_short_breaks_the_link(channels: tuple[Channel, Channel]) -> None:
    receiver = Link(channels[1], "stage 0")
    channels[0].send(pack(Opening(PLAN, "float32", (4, 4))) + b"\0" * 63)
    channels[0].socket.close()
    with pytest.raises(LinkBrokenError, match="in the middle of a step"):
        receiver.receive()
    receiver.close()


# ---- the handshake ----


def answer_once(listener: socket.socket, answer: bytes, number: int = 1) -> None:
    """As node `number` does; the next stage is that of node 1."""
    connection, _ = listener.accept()
    channel = Channel(connection, server_context(credentials(number)), is_server=True)
    with connection, suppress(OSError):  # whoever connects may leave when it sees who answers
        deadline = time.monotonic() + 10
        channel.shake_hands(deadline)
        receive_first(channel, deadline)
        channel.send(answer)


def connect_to(port: int, seconds: float, *more: Address) -> Link:
    return DIALLER.connect(second_stage(*more, Address(HOST, port)), LinkPlace(), seconds)


def second_stage(*addresses: Address) -> Neighbour:
    return stage_after(make_spec(0, 2), addresses)


def open_link(answer: bytes, seconds: float = 5.0) -> Link:
    with socket.create_server((HOST, 0)) as listener:
        thread = threading.Thread(target=answer_once, args=(listener, answer))
        thread.start()
        try:
            return connect_to(listener.getsockname()[1], seconds)
        finally:
            thread.join()


def test_a_welcome_makes_a_link() -> None:
    open_link(pack(LinkWelcome())).close()


def test_a_refusal_is_final_and_says_why() -> None:
    with pytest.raises(LinkRefusedError, match=r"stage 1 at .* was refused: not you"):
        open_link(pack(LinkRefused("not you.")))


def test_one_who_does_not_answer_as_a_stage_is_given_up() -> None:
    with pytest.raises(LinkBrokenError, match="No link to stage 1"):
        open_link(b"\x04\x00\x00\x00HTTP", seconds=0.2)


@pytest.mark.timed
def test_the_neighbour_may_start_late() -> None:
    with socket.create_server((HOST, 0)) as probe:
        port = probe.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(LinkBrokenError, match=r"No link to stage 1 at 127\.0\.0\.1:\d+ within 0 s"):
        connect_to(port, 0.3)
    assert 0.2 < time.monotonic() - started < 3

    def listen_late() -> None:
        time.sleep(0.2)
        with socket.create_server((HOST, port)) as listener:
            answer_once(listener, pack(LinkWelcome()))

    thread = threading.Thread(target=listen_late)
    thread.start()
    connect_to(port, 10).close()
    thread.join()


def test_the_first_address_may_lead_nowhere() -> None:
    """A node has many addresses, and only some are on a network that both are on."""
    with socket.create_server((HOST, 0)) as listener, socket.create_server((HOST, 0)) as wrong:
        threads = [
            threading.Thread(target=answer_once, args=(listener, pack(LinkWelcome()))),
            threading.Thread(target=answer_once, args=(wrong, pack(LinkWelcome()), 7)),
        ]
        for thread in threads:
            thread.start()
        nobody = Address("127.0.0.1", 1)
        other = Address(HOST, wrong.getsockname()[1])
        connect_to(listener.getsockname()[1], 5, nobody, other).close()
        for thread in threads:
            thread.join()


def test_all_that_was_tried_is_told() -> None:
    with pytest.raises(LinkBrokenError, match=r"stage 1 at 127.0.0.2:1, 127.0.0.1:1 within 0 s: Connection refused\."):
        connect_to(1, 0, Address("127.0.0.2", 1))
    with pytest.raises(LinkBrokenError, match=r"stage 1 at no address within 0 s: its node reports none"):
        DIALLER.connect(second_stage(), LinkPlace(), 0.1)


def test_a_first_frame_must_be_small(channels: tuple[Channel, Channel]) -> None:
    channels[0].send((1 << 20).to_bytes(4, "little"))
    with pytest.raises(FrameTooLargeError):
        receive_first(channels[1], time.monotonic() + 10)


def test_a_first_frame_must_be_quick(channels: tuple[Channel, Channel]) -> None:
    channels[0].send(b"\x05")
    with pytest.raises(TimeoutError):
        receive_first(channels[1], time.monotonic() + 0.1)


@pytest.mark.parametrize(
    ("hello", "peer", "is_taken"),
    [
        (LinkHello("instance-1", 0, 0, 3), 0, True),
        (LinkHello("instance-1", 0, 0, 3), 1, False),
        (LinkHello("instance-1", 0, 0, 3), 99, False),
        (LinkHello("instance-2", 0, 0, 3), 0, False),
        (LinkHello("instance-1", 0, 1, 3), 1, False),
        (LinkHello("instance-1", 0, 2, 3), 2, False),
        (LinkHello("instance-1", 0, 0, 2), 0, False),
    ],
)
def test_only_the_stage_before_may_link(hello: LinkHello, peer: int, is_taken: bool) -> None:  # noqa: FBT001
    assert (refusal(make_spec(1, 3), hello, node(peer).node_id) is None) is is_taken


@pytest.mark.parametrize(
    ("offer", "peer", "is_taken"),
    [
        (LinkOffer("instance-1", 0, 2, 3), 2, True),
        (LinkOffer("instance-1", 0, 2, 3), 0, False),
        (LinkOffer("instance-1", 0, 0, 3), 0, False),
        (LinkOffer("instance-2", 0, 2, 3), 2, False),
        (LinkOffer("instance-1", 0, 2, 4), 2, False),
    ],
)
def test_only_the_stage_after_may_offer_a_link(offer: LinkOffer, peer: int, is_taken: bool) -> None:  # noqa: FBT001
    assert (refusal(make_spec(1, 3), offer, node(peer).node_id) is None) is is_taken


def test_the_only_stage_has_no_links() -> None:
    assert refusal(make_spec(0, 1), LinkHello("instance-1", 0, 0, 1), node(0).node_id) is not None


STEPS, SUMS = Purpose.STEPS, Purpose.SUMS


@pytest.mark.parametrize(
    ("first", "peer", "is_taken"),
    [
        (RankHello("instance-1", 0, 1, 0, 3, STEPS), 0, True),
        (RankHello("instance-1", 0, 1, 0, 3, SUMS), 0, True),
        (RankOffer("instance-1", 0, 1, 2, 3, SUMS), 2, True),
        (RankHello("instance-1", 0, 1, 0, 3, SUMS), 99, False),  # a stranger with a member's certificate
        (RankHello("instance-1", 0, 1, 0, 3, STEPS), 2, False),  # another rank's node
        (RankOffer("instance-1", 0, 1, 2, 3, STEPS), 2, False),  # steps come from rank 0 alone
        (RankHello("instance-1", 0, 1, 2, 3, SUMS), 2, False),  # the lower one dials
        (RankOffer("instance-1", 0, 1, 0, 3, SUMS), 0, False),
        (RankHello("instance-1", 0, 1, 1, 3, SUMS), 1, False),  # itself
        (RankOffer("instance-1", 0, 1, 3, 3, SUMS), 2, False),  # there is none
        (RankHello("instance-1", 0, 1, -1, 3, SUMS), 2, False),
        (RankHello("instance-1", 0, 0, 0, 3, SUMS), 0, False),  # another stage
        (RankHello("instance-1", 0, 1, 0, 2, SUMS), 0, False),  # a share of another size
        (RankHello("instance-2", 0, 1, 0, 3, SUMS), 0, False),
        (LinkHello("instance-1", 0, 0, 2), 0, False),  # stages are linked by their first ranks
    ],
)
def test_only_the_ranks_of_its_stage_may_connect_to_a_rank(first: Greeting, peer: int, is_taken: bool) -> None:  # noqa: FBT001
    nodes = tuple(node(rank).node_id for rank in range(3))
    spec = make_spec(1, 2, rank=1, rank_count=3, rank_node_ids=nodes)
    assert (refusal(spec, first, node(peer).node_id) is None) is is_taken


def test_a_stage_alone_has_no_ranks() -> None:
    first = RankHello("instance-1", 0, 0, 0, 2, SUMS)
    assert refusal(make_spec(0, 1), first, node(0).node_id) is not None


def make_port(spec: RunnerSpec, index: int) -> DataPort:
    return DataPort(Reception(spec, credentials(index), Mailbox()))


class Neighbours:
    """The stages of a pipeline in one process, of which some can't be reached by others: who opens which link?"""

    def __init__(self, count: int) -> None:
        self.specs = [make_spec(index, count) for index in range(count)]
        self.ports = [make_port(spec, index) for index, spec in enumerate(self.specs)]
        self.failures: list[Exception] = []

    def way_to(self, index: int, hidden: Sequence[int]) -> tuple[Address, ...]:
        """Nobody answers where a hidden one says it is."""
        index %= len(self.ports)
        return (Address(HOST, 1 if index in hidden else self.ports[index].number),)

    def link(self, hidden: Sequence[int]) -> None:
        threads = [threading.Thread(target=self._link, args=(index, hidden)) for index in range(len(self.ports))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _link(self, index: int, hidden: Sequence[int]) -> None:
        port, spec, dialler = self.ports[index], self.specs[index], Dialler(client_context(credentials(index)))
        before = stage_before(spec, self.way_to(index - 1, hidden))
        offer = threading.Thread(target=dialler.offer, args=(before, port.reception.before, 10))
        offer.start()
        try:
            after = stage_after(spec, self.way_to(index + 1, hidden))
            dialler.connect(after, port.reception.after, 10).send(StepOutcome(index, ()))
        except (LinkBrokenError, LinkRefusedError) as error:
            self.failures.append(error)
        offer.join()

    def heard(self) -> list[int]:
        """Which stage each one's link from the stage before really comes from."""
        links = [port.reception.before.wait(0) for port in self.ports]
        return [link.receive().message.step for link in links if link]

    def close(self) -> None:
        for port in self.ports:
            port.close()


@pytest.mark.parametrize(("count", "hidden"), [(2, [1]), (2, [0]), (3, [1]), (3, [0]), (4, [0, 2])])
def test_a_node_that_can_only_dial_out_takes_part(
    monkeypatch: pytest.MonkeyPatch, count: int, hidden: list[int]
) -> None:
    monkeypatch.setattr(handshake, "OFFER_SECONDS", 0.2)
    stages = Neighbours(count)
    stages.link(hidden)
    assert stages.failures == []
    assert stages.heard() == [(index - 1) % count for index in range(count)]
    stages.close()


def test_two_sides_that_dial_at_once_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "OFFER_SECONDS", 0.0)
    for round_number in range(20):
        stages = Neighbours(2 + round_number % 2)
        stages.link([])
        assert stages.failures == []
        assert stages.heard() == [(index - 1) % len(stages.ports) for index in range(len(stages.ports))]
        stages.close()


def test_a_link_that_came_too_late_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another try held the place up, and whoever dialled has given up: the place must not hold a dead link."""
    monkeypatch.setattr(port_module, "WELCOME_SECONDS_MAX", 0.2)
    port = make_port(make_spec(1, 2), 1)
    is_over = threading.Event()

    def hang() -> Link:
        is_over.wait(10)
        raise ConnectionResetError("it was a try in vain")

    def hold() -> None:
        with suppress(ConnectionResetError):
            port.reception.before.fill(hang)

    holder = threading.Thread(target=hold)
    holder.start()
    place = LinkPlace()
    late = threading.Thread(target=DIALLER._dial_all, args=(second_stage(*at(port)), place, time.monotonic() + 9))
    late.start()
    time.sleep(0.5)
    is_over.set()
    for thread in (holder, late):
        thread.join()
    assert (place.wait(0), port.reception.before.wait(0)) == (None, None)
    DIALLER.connect(second_stage(*at(port)), place, 5).close()
    assert port.reception.before.wait(5) is not None
    port.close()


def at(port: DataPort) -> tuple[Address, ...]:
    return (Address(HOST, port.number),)


def test_two_that_can_only_dial_out_are_no_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "OFFER_SECONDS", 0.1)
    with pytest.raises(LinkBrokenError, match="Connection refused"):
        DIALLER.connect(second_stage(Address(HOST, 1)), LinkPlace(), 0.5)
    place = LinkPlace()
    before = stage_before(make_spec(1, 2), (Address(HOST, 1),))
    Dialler(client_context(credentials(1))).offer(before, place, 0.5)
    assert place.wait(0) is None


def test_the_last_stage_links_to_the_head() -> None:
    assert refusal(make_spec(0, 3), LinkHello("instance-1", 0, 2, 3), node(2).node_id) is None


# ---- connections with requests ----


def test_one_who_does_not_read_is_left_behind(channels: tuple[Channel, Channel]) -> None:
    """Sending never waits; once the backlog is full, the connection is closed instead."""
    connection = ServeConnection(channels[0], 1, can_prove_alive=False)
    events = [Prefilled(RequestId("r"), 0, number, 1000, 0) for number in range(1000)]
    sent = 0
    slowest = 0.0
    while not connection._closed:
        started = time.monotonic()
        connection.send(events)
        slowest = max(slowest, time.monotonic() - started)
        sent += sum(len(pack(event)) for event in events)
        assert sent < 20 * BACKLOG_BYTES_MAX
    assert slowest < 1
    assert sent > BACKLOG_BYTES_MAX
    connection.close()


def test_one_who_reads_late_gets_everything_in_order(channels: tuple[Channel, Channel]) -> None:
    near, far = channels
    near.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    connection = ServeConnection(near, 1, can_prove_alive=False)
    bodies = [pack(Prefilled(RequestId("r"), 0, number, 1000, 0)) for number in range(5000)]
    for number in range(5000):
        connection.send([Prefilled(RequestId("r"), 0, number, 1000, 0)])
    closer = threading.Thread(target=connection.close, args=(10.0,))
    closer.start()
    received = b""
    data = memoryview(bytearray(1 << 16))
    while count := far.receive(data):
        received += data[:count]
    closer.join()
    assert received == b"".join(bodies)
