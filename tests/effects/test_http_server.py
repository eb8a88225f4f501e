"""The API's port: taken, foreign, and freed in order."""

import socket
from typing import Any

import anyio
import httpx
import pytest

from covey.effects.http_server import HttpServer, ListenError, listen, port_of

pytestmark = pytest.mark.anyio


async def application(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/endless":
        while True:
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            await anyio.sleep(0.01)
    await send({"type": "http.response.body", "body": b"hello"})


async def test_a_port_in_use_is_a_sentence() -> None:
    with listen("127.0.0.1", 0) as first:
        port = port_of(first)
        with pytest.raises(ListenError, match=rf"port {port} of 127\.0\.0\.1 is in use; end the program"):
            listen("127.0.0.1", port)
    with listen("127.0.0.1", port):  # free again at once
        pass


@pytest.mark.parametrize("host", ["192.0.2.77", "no-such-host.invalid"])
async def test_a_host_that_is_not_this_machine(host: str) -> None:
    with pytest.raises(ListenError, match="is no address of this machine"):
        listen(host, 0)


async def test_it_serves_and_ends_although_an_answer_is_under_way(caplog: pytest.LogCaptureFixture) -> None:
    listener = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{port_of(listener)}"
    server = HttpServer(application, listener)
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks, httpx.AsyncClient() as client:
            tasks.start_soon(server.serve)
            assert (await client.get(url)).text == "hello"
            async with client.stream("GET", f"{url}/endless") as response:
                pieces = response.aiter_raw()
                assert await anext(pieces) == b"x"
                server.stop()
                with pytest.raises(httpx.RemoteProtocolError):
                    async for _ in pieces:
                        pass
    assert caplog.records == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=5)
