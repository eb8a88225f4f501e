"""Somebody without the join code tries every port at which a node and its runners await others, over and over."""

import socket
import ssl
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from credentials import credentials_in
from nodes import NodeProcess, cluster_name, running, until
from strangers import foreign, malformed
from tiny_model import write_model

from covey.engine.tls import client_context
from covey.schema.trust import Credentials

HOST = "127.0.0.1"
ALERT, HANDSHAKE = b"\x15", b"\x16"  # first byte of a TLS record
KEPT_S = 0.5
ROUNDS = 4  # after one that warms up
GROWTH_BYTES_MAX = 8 * 1024 * 1024
LOG_BYTES_MAX = 40_000  # of all rounds: a line for each who was refused
JOIN_S_MAX = 20.0


@pytest.fixture
def pair(tmp_path: Path) -> Generator[tuple[NodeProcess, NodeProcess, Path, Credentials]]:
    """Two nodes that hold a model, the model, and what a third member would show."""
    model = write_model(tmp_path / "model.gguf", layers=4)
    cluster = cluster_name()
    with running(tmp_path, "a", "b", cluster=cluster) as (a, b):
        until(lambda: len(a.visibility()) == len(b.visibility()) == 2)
        a.post("/place_instance", {"model_id": str(model), "min_nodes": 2})
        until(lambda: list(a.runners().values()) == ["Ready"] * 2)
        yield a, b, model, credentials_in(tmp_path, cluster)


@pytest.fixture
def strangers(pair: tuple[NodeProcess, NodeProcess, Path, Credentials], tmp_path: Path) -> list[ssl.SSLContext]:
    """Clients, each with a certificate that is none of this cluster."""
    return [stranger(shown, tmp_path / "shown.pem") for shown in foreign(pair[3]).values()]


def stranger(shown: Credentials | None, file: Path = Path()) -> ssl.SSLContext:
    """He wants in, whoever it is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if shown:
        file.write_bytes(shown.certificate + shown.private_key)
        context.load_cert_chain(file)
    return context


def doors(node: NodeProcess) -> list[int]:
    """TCP ports at which its mesh process and its runner listen."""
    found = [each for child in node.children() for each in child.net_connections(kind="tcp")]
    return [each.laddr.port for each in found if each.status == psutil.CONN_LISTEN]


def shaken(port: int, client: ssl.SSLContext) -> bytes | None:
    """What the other side says after the handshake; None where it waits for more. Raises `OSError` if it refuses."""
    with socket.create_connection((HOST, port), 10) as plain, client.wrap_socket(plain) as secure:
        secure.settimeout(KEPT_S)
        try:
            answer = secure.recv(4096)
        except TimeoutError:
            return None
    if not answer:
        raise ConnectionError
    return answer


def sent(port: int, data: bytes) -> bytes:
    """What comes back at once."""
    with socket.create_connection((HOST, port), 10) as stranger, suppress(OSError):
        stranger.settimeout(1)
        stranger.sendall(data)
        stranger.shutdown(socket.SHUT_WR)
        return stranger.recv(4096)
    return b""


def try_everything(port: int, strangers: list[ssl.SSLContext]) -> None:
    for client in [*strangers, stranger(None)]:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            shaken(port, client)
    for data in malformed():
        assert sent(port, data)[:1] in {b"", ALERT, HANDSHAKE}


@pytest.mark.slow
def test_who_has_no_code_opens_no_door_and_leaves_no_trace(
    pair: tuple[NodeProcess, NodeProcess, Path, Credentials], strangers: list[ssl.SSLContext], tmp_path: Path
) -> None:
    a, b, model, shown = pair
    member = client_context(shown)
    children = {child.pid for node in (a, b) for child in node.children()}
    ports = doors(a)
    assert len(ports) == 2
    for port in ports:
        assert shaken(port, member) is None  # or the refusals below would show nothing
        try_everything(port, strangers)
    before, logged = held_bytes(a), log_bytes(tmp_path)
    for _ in range(ROUNDS):
        for port in ports:
            try_everything(port, strangers)
    grown, written = held_bytes(a) - before, log_bytes(tmp_path) - logged
    print(f"{ROUNDS} rounds: {grown / 1e6:.1f} MB grown, {written} bytes logged")
    assert grown < GROWTH_BYTES_MAX
    assert written < LOG_BYTES_MAX
    assert {child.pid for node in (a, b) for child in node.children()} == children
    assert a.visibility() == b.visibility() == {"a": "visible", "b": "visible"}
    assert a.ask(str(model), "Who is there?", max_tokens=12) == b.ask(str(model), "Who is there?", max_tokens=12)
    took_s = until(lambda: lets_in(ports, member), JOIN_S_MAX)
    print(f"a member is let in after {took_s:.1f} s")
    assert "Traceback" not in a.errors() + b.errors()


def lets_in(ports: list[int], member: ssl.SSLContext) -> bool:
    with suppress(OSError):
        return all(shaken(port, member) is None for port in ports)
    return False


def held_bytes(node: NodeProcess) -> int:
    """Of memory, by the node and its children."""
    return sum(each.memory_info().rss for each in (psutil.Process(node.process.pid), *node.children()))


def log_bytes(home: Path) -> int:
    """Of whatever is written under the nodes' folder, but for the databases of intent."""
    files = [path for pattern in ("*.stderr", "**/*.log") for path in home.glob(pattern)]
    return sum(path.stat().st_size for path in files)
