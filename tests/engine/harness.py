"""Runner processes as a node would start them, and a blocking client as simple as can be."""

import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Self

import msgspec
import numpy as np

from covey.engine.contract import ALONE, Piece
from covey.engine.fake import FakeStage
from covey.engine.plan import SamplingStart, StepPlan
from covey.engine.sampler import Sampler
from covey.engine.tls import Channel, client_context, server_context
from covey.schema.generation import (
    Admit,
    Broken,
    Ended,
    HeadEvent,
    HeadMessage,
    ProveAlive,
    Sampling,
    ServeHello,
    ServeMessage,
    TokenSampled,
)
from covey.schema.ids import RequestId, RunnerId
from covey.schema.model import Shard
from covey.schema.runner import (
    Address,
    Configure,
    Connected,
    ConnectTo,
    Listening,
    Load,
    Loaded,
    PhaseFailed,
    Ready,
    RunnerCommand,
    RunnerMessage,
    RunnerSpec,
    ShutDown,
    WarmUp,
)
from covey.schema.trust import Credentials
from covey.schema.wire import FrameBuffer, pack
from tests.credentials import credentials as credentials_of
from tests.credentials import node

WAIT_SECONDS = 20.0
HOST = "127.0.0.1"
GREEDY = Sampling(temperature=0.0)
_messages = msgspec.msgpack.Decoder(RunnerMessage)
_heard = msgspec.msgpack.Decoder(HeadMessage)


def make_spec(stage_index: int = 0, stage_count: int = 1, **changes: Any) -> RunnerSpec:
    layers = 6
    start, end = (layers * place // stage_count for place in (stage_index, stage_index + 1))
    spec = RunnerSpec(
        runner_id=RunnerId(f"runner-{stage_index}"),
        instance_id="instance-1",
        engine="fake",
        model_path="",
        shard=Shard(start, end, layers),
        stage_index=stage_index,
        stage_count=stage_count,
        stage_node_ids=tuple(node(index).node_id for index in range(stage_count)),
        context_length=2048,
        slot_count=4,
        thread_count=1,
        listen_host=HOST,
        connect_ms=20_000,
    )
    return msgspec.structs.replace(spec, **changes)


def make_rank_spec(place: int, rank_count: int, stage_count: int = 1, **changes: Any) -> RunnerSpec:
    """Of the runner at `place` in the instance: ranks of a stage stand side by side, each on a node of its own."""
    stage, rank = divmod(place, rank_count)
    nodes = [node(number).node_id for number in range(rank_count * stage_count)]
    ranks = {
        "runner_id": RunnerId(f"runner-{place}"),
        "stage_node_ids": tuple(nodes[::rank_count]),
        "rank": rank,
        "rank_count": rank_count,
        "rank_node_ids": tuple(nodes[stage * rank_count : (stage + 1) * rank_count]),
    }
    return make_spec(stage, stage_count, **{**ranks, **changes})


def number_of(spec: RunnerSpec) -> int:
    """Of the node that it is for."""
    return spec.stage_index * spec.rank_count + spec.rank


def loaded(spec: RunnerSpec) -> FakeStage:
    stage = FakeStage()
    stage.load(spec, lambda _: None, ALONE)
    return stage


class Runner:
    """A runner process with its standard input and output."""

    def __init__(self, spec: RunnerSpec, credentials: Credentials | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "covey.engine"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.messages: list[RunnerMessage] = []
        self.seen: list[RunnerMessage] = []
        self._frames = FrameBuffer()
        self.tell(Configure(spec, credentials or credentials_of(number_of(spec))))

    def tell(self, command: RunnerCommand) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(pack(command))
        self.process.stdin.flush()

    def wait(self, kind: type[Any], seconds: float = WAIT_SECONDS) -> Any:
        """The next message of `kind`; others before it are kept in `seen`."""
        deadline = time.monotonic() + seconds
        while True:
            while self.messages:
                message = self.messages.pop(0)
                self.seen.append(message)
                if isinstance(message, kind):
                    return message
                assert not isinstance(message, PhaseFailed), message
            self._read(deadline)

    def wait_end(self, seconds: float = WAIT_SECONDS) -> int:
        return self.process.wait(seconds)

    def close(self) -> str:
        """Ends the process if it still runs; returns what it logged."""
        if self.process.poll() is None:
            self.process.kill()
        if self.process.stdin and self.process.stdin.closed:
            self.process.stdin = None  # or `communicate` would flush it
        _, errors = self.process.communicate(timeout=WAIT_SECONDS)
        return errors.decode()

    def _read(self, deadline: float) -> None:
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        ready, _, _ = select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))
        assert ready, f"nothing came in time; before it came {self.seen}"
        data = os.read(descriptor, 65536)
        assert data, f"the runner ended; before it said {self.seen}"
        self.messages += map(_messages.decode, self._frames.feed(data))


def bring_up(runners: Sequence[Runner]) -> list[int]:
    """Takes all to Ready, the stages of a phase side by side; returns their data ports."""
    ports = [runner.wait(Listening).port for runner in runners]
    for place, runner in enumerate(runners):
        runner.tell(ConnectTo((Address(HOST, ports[(place + 1) % len(ports)]),)))
    for answer, command in ((Connected, Load()), (Loaded, WarmUp())):
        for runner in runners:
            runner.wait(answer)
            runner.tell(command)
    for runner in runners:
        runner.wait(Ready)
    return ports


def bring_ranks_up(runners: Sequence[Runner], rank_count: int) -> list[int]:
    """The same where as many of them in a row share a stage."""
    ports = [runner.wait(Listening).port for runner in runners]
    ways = [(Address(HOST, port),) for port in ports]
    for place, runner in enumerate(runners):
        begin = place // rank_count * rank_count
        after, before = ((begin + step) % len(runners) for step in (rank_count, -rank_count))
        linked = (ways[after], ways[before]) if place == begin else ((), ())
        runner.tell(ConnectTo(*linked, tuple(ways[begin : begin + rank_count])))
    for answer, command in ((Connected, Load()), (Loaded, WarmUp())):
        for runner in runners:
            runner.wait(answer)
        for runner in runners:
            runner.tell(command)
    for runner in runners:
        runner.wait(Ready)
    return ports


@contextmanager
def rank_pipeline(rank_count: int, stage_count: int = 1, **changes: Any) -> Iterator[tuple[list[Runner], int]]:
    """Ready runners, and the head's port. All are ended at the end."""
    specs = [make_rank_spec(place, rank_count, stage_count, **changes) for place in range(rank_count * stage_count)]
    runners = [Runner(spec) for spec in specs]
    try:
        yield runners, bring_ranks_up(runners, rank_count)[0]
    finally:
        for runner in runners:
            runner.close()


@contextmanager
def pipeline(stage_count: int, **changes: Any) -> Iterator[tuple[list[Runner], int]]:
    """Ready runners, and the head's port. All are ended at the end."""
    runners = [Runner(make_spec(index, stage_count, **changes)) for index in range(stage_count)]
    try:
        yield runners, bring_up(runners)[0]
    finally:
        for runner in runners:
            runner.close()


class Client:
    """A connection as `serving` opens it, that blocks."""

    def __init__(self, port: int, instance_id: str = "instance-1", *, can_prove_alive: bool = False) -> None:
        """One that can prove that it is alive, and never does by itself, is one that has fallen silent."""
        plain = socket.create_connection((HOST, port), WAIT_SECONDS)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = client_context(credentials_of(99)).wrap_socket(plain)
        self.socket.sendall(pack(ServeHello(instance_id, can_prove_alive)))
        self._frames = FrameBuffer()
        self._events: list[HeadEvent] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *commands: ServeMessage) -> None:
        self.socket.sendall(b"".join(map(pack, commands)))

    def next_event(self) -> HeadEvent | None:
        """The next event; None once the other side has closed."""
        while not self._events:
            data = self.socket.recv(65536)
            if not data:
                return None
            heard = map(_heard.decode, self._frames.feed(data))
            self._events += [each for each in heard if not isinstance(each, ProveAlive)]
        return self._events.pop(0)

    def events_until(self, is_last: Callable[[HeadEvent], bool]) -> list[HeadEvent]:
        events: list[HeadEvent] = []
        while not events or not is_last(events[-1]):
            event = self.next_event()
            assert event is not None, f"the head closed the connection after {events[-3:]}"
            events.append(event)
        return events

    def events_of_all(self, request_ids: Iterable[str]) -> dict[str, list[HeadEvent]]:
        """The events of these requests, until all have ended."""
        collected: dict[str, list[HeadEvent]] = {request_id: [] for request_id in request_ids}
        open_ids = set(collected)
        while open_ids:
            event = self.next_event()
            assert event is not None, "the head closed the connection"
            collected[event.request_id].append(event)
            if isinstance(event, Ended | Broken):
                open_ids.remove(event.request_id)
        return collected


def open_channel(port: int, number: int = 99) -> Channel:
    """A connection of node `number` that has said nothing yet."""
    connection = socket.create_connection((HOST, port), WAIT_SECONDS)
    channel = Channel(connection, client_context(credentials_of(number)), is_server=False)
    channel.shake_hands(time.monotonic() + WAIT_SECONDS)
    connection.settimeout(WAIT_SECONDS)
    return channel


def channel_pair(near: socket.socket, far: socket.socket) -> tuple[Channel, Channel]:
    """Both ends of a connection of node 0 to node 1."""
    first = Channel(near, client_context(credentials_of(0)), is_server=False)
    second = Channel(far, server_context(credentials_of(1)), is_server=True)
    deadline = time.monotonic() + WAIT_SECONDS
    thread = threading.Thread(target=second.shake_hands, args=(deadline,))
    thread.start()
    first.shake_hands(deadline)
    thread.join()
    return first, second


def make_admit(name: str, token_ids: Iterable[int], count: int = 16, **changes: Any) -> Admit:
    ids = tuple(token_ids)
    admit = Admit(
        request_id=RequestId(name),
        attempt=0,
        token_ids=ids,
        prompt_length=len(ids),
        sampling=GREEDY,
        token_count_max=count,
        stop_token_ids=(),
    )
    return msgspec.structs.replace(admit, **changes)


def sampled(events: Iterable[HeadEvent]) -> list[int]:
    return [event.token_id for event in events if isinstance(event, TokenSampled)]


def expected_tokens(admit: Admit) -> list[int]:
    """The dumb twin: one fake stage, one request, the whole sequence computed anew for every token."""
    spec = make_spec()
    sampler = Sampler()
    tokens = list(admit.token_ids)
    start = SamplingStart(
        0, admit.sampling, admit.token_ids[: admit.prompt_length], admit.token_ids[admit.prompt_length :]
    )
    for step in range(admit.prompt_length + admit.token_count_max - len(admit.token_ids)):
        plan = StepPlan(step, (Piece(0, 0, len(tokens), wants_logits=True),), (start,) if step == 0 else ())
        logits = loaded(spec).run(plan.pieces, np.array(tokens, np.int64))
        token_id = sampler.sample(plan, logits).token_ids[0]
        assert token_id is not None
        if token_id in admit.stop_token_ids:
            break
        tokens.append(token_id)
    return tokens[len(admit.token_ids) :]


def shut_down(runners: Iterable[Runner]) -> list[int]:
    """Ends all; returns the exit statuses. Who learns of a neighbour's end before its own has failed: status 1."""
    for runner in runners:
        with suppress(BrokenPipeError):
            runner.tell(ShutDown())
    return [runner.wait_end() for runner in runners]
