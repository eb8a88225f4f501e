"""Clients whose machine vanishes close nothing: their requests end all the same, and their slots are free again."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from covey.engine import connection as connection_module
from covey.engine.connection import ALIVE_MS, COMMANDS_WAITING_MAX, SILENCE_MS, ServeConnection
from covey.engine.tls import Channel
from covey.schema.generation import Alive, Cancel, Ended, FinishReason, Queued, TokenSampled
from covey.schema.ids import RequestId
from covey.schema.runner import Activity
from covey.schema.wire import pack
from tests.engine.harness import HOST, Client, channel_pair, expected_tokens, make_admit, pipeline, sampled

TOKENS = 1500  # at 10 ms each: longer than any silence


@pytest.fixture
def channels() -> Iterator[tuple[Channel, Channel]]:
    with socket.create_server((HOST, 0)) as listener:
        far = socket.create_connection(listener.getsockname())
        near, _ = listener.accept()
    with near, far:
        yield channel_pair(near, far)


# ---- one connection ----


@pytest.mark.timed
def test_one_who_falls_silent_is_taken_for_dead(
    channels: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its machine was switched off: nothing is closed. What it had asked for comes through, and then the end."""
    monkeypatch.setattr(connection_module, "SILENCE_MS", 300)
    near, far = channels
    connection = ServeConnection(near, 1, can_prove_alive=True)
    far.send(pack(Cancel(RequestId("r"), 0)))
    begun = time.monotonic()
    assert list(connection.commands()) == [Cancel(RequestId("r"), 0)]
    assert 0.3 <= time.monotonic() - begun < 2
    connection.close()


def test_one_who_proves_that_it_is_alive_is_listened_to(
    channels: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its proofs are no commands: they wait for nothing, however many there are."""
    monkeypatch.setattr(connection_module, "SILENCE_MS", 300)
    near, far = channels
    connection = ServeConnection(near, 1, can_prove_alive=True)

    def live() -> None:
        far.send(pack(Alive()) * (COMMANDS_WAITING_MAX + 10))
        for _ in range(8):
            time.sleep(0.1)
            far.send(pack(Alive()))
        far.send(pack(Cancel(RequestId("r"), 0)))
        far.socket.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=live)
    thread.start()
    assert list(connection.commands()) == [Cancel(RequestId("r"), 0)]
    thread.join()
    connection.close()


def test_commands_that_wait_are_no_silence(channels: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch) -> None:
    """The head computes a long step, and reads nothing meanwhile."""
    monkeypatch.setattr(connection_module, "SILENCE_MS", 200)
    near, far = channels
    connection = ServeConnection(near, 1, can_prove_alive=True)
    count = COMMANDS_WAITING_MAX + 2
    for _ in range(count):
        far.send(pack(Cancel(RequestId("r"), 0)))
    commands = connection.commands()
    for _ in range(COMMANDS_WAITING_MAX):
        next(commands)
    freed = threading.Timer(0.6, lambda: [connection.handled() for _ in range(count)])
    freed.start()
    assert sum(1 for _ in commands) == 2
    freed.join()
    connection.close()


def test_one_who_can_not_prove_it_may_be_silent(
    channels: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node of an older version."""
    monkeypatch.setattr(connection_module, "SILENCE_MS", 100)
    near, far = channels
    connection = ServeConnection(near, 1, can_prove_alive=False)
    late = threading.Timer(0.5, lambda: (far.send(pack(Cancel(RequestId("r"), 0))), far.socket.close()))
    late.start()
    assert list(connection.commands()) == [Cancel(RequestId("r"), 0)]
    late.join()
    connection.close()


# ---- a head ----


@pytest.mark.timed
def test_a_head_ends_what_nobody_waits_for() -> None:
    """Three ask: one falls silent without a word, one proves that it is alive, one is of an older version and can't.
    The slot of the first is free within a second or so of the silence that is allowed, and goes to who waits for it.
    """
    with (
        pipeline(1, slot_count=3, engine_options={"step_delay_ms": "10"}) as ([runner], port),
        Client(port, can_prove_alive=True) as silent,
        Client(port, can_prove_alive=True) as living,
        Client(port) as older,
        Client(port) as next_one,
    ):
        over = threading.Event()
        proving = threading.Thread(target=prove, args=(living, over))
        proving.start()
        for name, client in (("silent", silent), ("living", living), ("older", older)):
            client.send(make_admit(name, [len(name), 2, 3], TOKENS))
            client.events_until(lambda event: isinstance(event, TokenSampled))
        begun = time.monotonic()
        follower = make_admit("next", [7, 8, 9], 4)
        next_one.send(follower)
        events = next_one.events_until(lambda event: isinstance(event, Ended))
        waited_s = time.monotonic() - begun
        assert isinstance(events[0], Queued)
        assert sampled(events) == expected_tokens(follower)
        assert SILENCE_MS / 1000 - 1 < waited_s < SILENCE_MS / 1000 + 2
        while (event := silent.next_event()) is not None:  # what it had got until then; then the end
            assert not isinstance(event, Ended)
        for client in (living, older):
            end = client.events_until(lambda event: isinstance(event, Ended))[-1]
            assert isinstance(end, Ended)
            assert (end.reason, end.completion_tokens) == (FinishReason.LENGTH, TOKENS)
        over.set()
        proving.join()
        while runner.wait(Activity).running:
            pass


def prove(client: Client, over: threading.Event) -> None:
    while not over.wait(ALIVE_MS / 1000):
        client.send(Alive())
