"""Why a named peer is not reached."""

import socket
import ssl
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from credentials import OTHER_CODE, credentials

from covey.effects.peer_check import examine
from covey.schema.trust import Credentials

pytestmark = pytest.mark.anyio


@contextmanager
def listening(answer: bytes = b"", shown: Credentials | None = None, folder: Path = Path()) -> Generator[int]:
    """A port where one connection is taken: by TLS that wants a certificate, or by a program that says `answer`."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            if shown is None:
                connection.sendall(answer)
                return
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            (folder / "chain").write_bytes(shown.certificate + shown.private_key)
            context.load_cert_chain(folder / "chain")
            context.load_verify_locations(cadata=shown.authority.decode())
            context.verify_mode = ssl.CERT_REQUIRED
            with suppress(OSError):  # the other side has seen enough
                context.wrap_socket(connection, server_side=True).recv(1)

    thread = threading.Thread(target=serve)
    thread.start()
    with listener:
        yield listener.getsockname()[1]
        thread.join(10)


async def test_one_of_ours_has_nothing_wrong(tmp_path: Path) -> None:
    with listening(shown=credentials(), folder=tmp_path) as port:
        assert await examine([("127.0.0.1", port)], credentials().authority) == ()


async def test_another_join_code(tmp_path: Path) -> None:
    with listening(shown=credentials(code=OTHER_CODE), folder=tmp_path) as port:
        (sentence,) = await examine([("127.0.0.1", port)], credentials().authority)
    assert sentence.startswith("the node at 127.0.0.1 belongs to another cluster: its join code differs")


async def test_another_program() -> None:
    with listening(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        (sentence,) = await examine([("127.0.0.1", port)], credentials().authority)
    assert "answers something that is no node with a join code" in sentence


async def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    (sentence,) = await examine([("127.0.0.1", port)], credentials().authority)
    assert sentence.startswith(f"the peer 127.0.0.1 is not reached at TCP port {port} (")


@pytest.mark.parametrize("host", ["my..host", "a" * 64])
async def test_a_name_that_is_none(host: str) -> None:
    (sentence,) = await examine([(host, 53415)], credentials().authority)
    assert sentence == f"the peer {host} is not looked up: no host can have that name"
