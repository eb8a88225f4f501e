"""Clients that are slow, endless, many or malformed, over real sockets: none holds a connection or memory for long."""

import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.abc
import pytest

from covey.api import answers
from covey.api.guard import Access
from covey.api.server import create_guarded_app
from covey.effects import http_protocol
from covey.effects.http_server import HttpServer, listen, port_of
from covey.schema.generation import GenerationStarted, TextGenerated
from covey.schema.ids import RequestId
from tests.api.fake_backend import FakeBackend

pytestmark = pytest.mark.anyio
SHORT_S = 0.3
PATIENCE_S = 10
GET = b"GET /node_id HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_S_MAX", SHORT_S)
    monkeypatch.setattr(http_protocol, "STALL_S", SHORT_S)
    monkeypatch.setattr(answers, "BODY_S_MAX", SHORT_S)


@asynccontextmanager
async def served(application: Any = None) -> AsyncIterator[int]:
    """The port of a node in memory."""
    listener = listen("127.0.0.1", 0)
    server = HttpServer(application or create_guarded_app(FakeBackend(), Access()), listener)
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.serve)
            yield port_of(listener)
            server.stop()


async def until_closed(client: anyio.abc.ByteStream) -> bytes:
    """All that comes until the node ends the connection."""
    said = b""
    with anyio.fail_after(PATIENCE_S):
        try:
            while True:
                said += await client.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            return said


async def drip(client: anyio.abc.ByteStream, piece: bytes) -> None:
    """One piece every while, until nobody listens."""
    try:
        while True:
            await client.send(piece)
            await anyio.sleep(SHORT_S / 10)
    except (anyio.BrokenResourceError, anyio.ClosedResourceError):
        return


def status(said: bytes) -> int:
    return int(said.split(b" ", 2)[1])


def error(said: bytes) -> dict[str, Any]:
    return dict(json.loads(said.partition(b"\r\n\r\n")[2])["error"])


# ---- heads ----


@pytest.mark.parametrize("begin", [b"", b"G", b"GET / HTTP/1.1\r\nHost: localhost\r\n", GET])
async def test_silence_ends_a_connection(begin: bytes) -> None:
    async with served() as port, await anyio.connect_tcp("127.0.0.1", port) as client:
        if begin:
            await client.send(begin)
        said = await until_closed(client)
        assert said == b"" or status(said) == 200


@pytest.mark.parametrize("before", [b"", GET])
async def test_a_head_that_drips_in_ends_in_time(before: bytes) -> None:
    async with (
        served() as port,
        await anyio.connect_tcp("127.0.0.1", port) as client,
        anyio.create_task_group() as tasks,
    ):
        await client.send(before + b"GET / HTTP/1.1\r\n")
        tasks.start_soon(drip, client, b"x: y\r\n")
        await until_closed(client)
        tasks.cancel_scope.cancel()


async def test_a_head_over_the_limit_is_told_so() -> None:
    async with served() as port:
        for sent in (b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000, b"G" * 70_000):
            async with await anyio.connect_tcp("127.0.0.1", port) as client:
                await client.send(sent)
                said = await until_closed(client)
                assert (status(said), error(said)["status"]) == (431, 431)


@pytest.mark.parametrize(
    "sent",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"nonsense\r\n\r\n", b"GET / HTTP/x\r\n\r\n", b"\r\n\r\n\r\n\0",
     b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
     b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
     b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"],
)  # fmt: skip
async def test_what_is_no_request_is_answered_in_the_envelope(sent: bytes) -> None:
    async with served() as port, await anyio.connect_tcp("127.0.0.1", port) as client:
        await client.send(sent)
        said = await until_closed(client)
        assert status(said) == 400
        assert set(error(said)) == {"message", "type", "param", "code", "status"}


async def test_a_websocket_is_an_ordinary_request_here(caplog: pytest.LogCaptureFixture) -> None:
    upgrade = b"GET /node_id HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    async with served() as port, await anyio.connect_tcp("127.0.0.1", port) as client:
        await client.send(upgrade)
        assert status(await until_closed(client)) == 200
    assert caplog.text == ""  # strangers write no line into our log


# ---- bodies ----

POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"


async def test_a_body_that_drips_in_ends_in_time() -> None:
    async with (
        served() as port,
        await anyio.connect_tcp("127.0.0.1", port) as client,
        anyio.create_task_group() as tasks,
    ):
        await client.send(POST + b"Content-Length: 1000000\r\n\r\n")
        tasks.start_soon(drip, client, b" ")
        said = await until_closed(client)
        tasks.cancel_scope.cancel()
        assert (status(said), error(said)["status"]) == (408, 408)


async def test_an_endless_body_ends_at_the_limit() -> None:
    async with (
        served() as port,
        await anyio.connect_tcp("127.0.0.1", port) as client,
        anyio.create_task_group() as tasks,
    ):
        await client.send(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        tasks.start_soon(flood, client, b"10000\r\n" + b" " * 0x10000 + b"\r\n")
        said = await until_closed(client)
        tasks.cancel_scope.cancel()
        assert status(said) in {408, 413}


async def flood(client: anyio.abc.ByteStream, piece: bytes) -> None:
    try:
        while True:
            await client.send(piece)
    except (anyio.BrokenResourceError, anyio.ClosedResourceError):
        return


async def test_all_bodies_together_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "BODIES_BYTES_MAX", 100_000)
    monkeypatch.setattr(answers, "BODY_S_MAX", PATIENCE_S)
    async with served() as port:
        async with await anyio.connect_tcp("127.0.0.1", port) as first:
            await first.send(POST + b"Content-Length: 90000\r\n\r\n" + b" " * 80_000)
            await anyio.sleep(0.1)
            async with await anyio.connect_tcp("127.0.0.1", port) as second:
                await second.send(POST + b"Content-Length: 40000\r\n\r\n" + b" " * 40_000)
                said = await until_closed(second)
                assert (status(said), b"retry-after" in said.lower()) == (503, True)
        await anyio.sleep(0.1)  # the first one left, and its share is free
        async with await anyio.connect_tcp("127.0.0.1", port) as third:
            await third.send(POST + b"Content-Length: 90000\r\n\r\n" + b" " * 90_000)
            assert status(await until_closed(third)) == 400


# ---- answers that are not read ----


class Endless(FakeBackend):
    """Speaks as fast as somebody listens."""

    async def generate(self, request: Any) -> Any:  # noqa: ARG002 - the shape of the real one
        self.said = 0
        try:
            yield GenerationStarted(RequestId("r"), 1, 1)
            while True:
                self.said += 1
                yield TextGenerated("word " * 2000, (1,))
        finally:
            self.closed += 1


async def test_a_client_that_does_not_read_its_stream_is_dropped() -> None:
    backend = Endless()
    body = json.dumps({"model": "Tiny-Chat", "messages": [{"role": "user", "content": "?"}], "stream": True}).encode()
    async with served(create_guarded_app(backend, Access())) as port:
        raw = socket.create_connection(("127.0.0.1", port))
        raw.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        with anyio.fail_after(PATIENCE_S):
            while not backend.closed:  # noqa: ASYNC110 - the fake has no more to tell
                await anyio.sleep(0.02)
        raw.close()
    assert backend.said < 1500  # 10 kB each: what the two kernels hold, and our 64 kB


async def test_a_client_that_reads_slowly_but_reads_is_served() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * 8_000_000})

    async with served(application) as port:
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)  # else the kernel reads for it
        raw.connect(("127.0.0.1", port))
        async with await anyio.abc.SocketStream.from_socket(raw) as client:
            await client.send(GET)
            count = 0
            with anyio.fail_after(PATIENCE_S):
                while count < 8_000_000:
                    count += len(await client.receive(200_000))
                    await anyio.sleep(SHORT_S / 60)


# ---- many ----


async def test_only_so_many_connections_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "connections_max", lambda: 3)
    monkeypatch.setattr(http_protocol, "HEAD_S_MAX", PATIENCE_S)
    async with served() as port:
        held = [await anyio.connect_tcp("127.0.0.1", port) for _ in range(3)]
        await anyio.sleep(0.1)
        async with await anyio.connect_tcp("127.0.0.1", port) as one_too_many:
            said = await until_closed(one_too_many)
            assert (status(said), error(said)["status"]) == (503, 503)
        for client in held:
            await client.aclose()
        await anyio.sleep(0.1)
        async with await anyio.connect_tcp("127.0.0.1", port) as again:
            await again.send(GET)
            assert (await again.receive()).startswith(b"HTTP/1.1 200")


def test_the_number_of_connections_leaves_files_for_others() -> None:
    assert 16 <= http_protocol.connections_max() <= http_protocol.CONNECTIONS_MAX
