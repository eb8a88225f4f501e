"""Somebody without the join code is on the same network, and tries. The runner refuses, and goes on serving."""

import contextlib
import datetime as dt
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from covey.effects import trust
from covey.effects.identity import Identity
from covey.engine.handshake import HELLO_SECONDS
from covey.engine.strangers import STRANGERS_MAX
from covey.engine.tls import client_context, server_context
from covey.schema.generation import ServeHello
from covey.schema.runner import Address, ConnectTo, Listening, PhaseFailed
from covey.schema.trust import Credentials
from covey.schema.wire import pack
from tests.credentials import CODE, OTHER_CODE, credentials, node
from tests.engine.harness import (
    HOST,
    Client,
    Runner,
    expected_tokens,
    make_admit,
    make_spec,
    pipeline,
    sampled,
)
from tests.strangers import first_flight, malformed

MEMBER, STRANGER = node(5), node(6)
HELLO = pack(ServeHello("instance-1"))
AUTHORITY_KEY = trust.authority_key(CODE)


@pytest.fixture(scope="module")
def alone() -> Iterator[tuple[Runner, int]]:
    with pipeline(1, vocabulary_size=256) as (runners, port):
        yield runners[0], port


def assert_serves(port: int) -> None:
    admit = make_admit("check", [1, 2, 3], 4)
    with Client(port) as client:
        client.send(admit)
        assert sampled(client.events_of_all(["check"])["check"]) == expected_tokens(admit)


def certificate(
    *,
    subject: str = MEMBER.node_id,
    mine: Identity = MEMBER,
    key: Any = None,
    until: dt.datetime = trust.VALID_UNTIL,
    signer: Any = AUTHORITY_KEY,
) -> Credentials:
    """What node 5 would show, but for what is changed: any member can make such a thing."""
    key = key or mine.key
    authority = x509.load_pem_x509_certificate(credentials().authority)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    builder = x509.CertificateBuilder(authority.subject, name, key.public_key(), 7, trust.VALID_FROM, until)
    for extension in x509.load_pem_x509_certificate(credentials(5).certificate).extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    return msgspec.structs.replace(
        credentials(5),
        certificate=builder.sign(signer, None).public_bytes(Encoding.PEM),
        private_key=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    )


CERTIFICATES = {
    "another cluster's": msgspec.structs.replace(credentials(6, OTHER_CODE), authority=credentials().authority),
    "self-signed": certificate(signer=MEMBER.key),
    "with the authority's name": certificate(signer=STRANGER.key),
    "expired": certificate(until=dt.datetime(1971, 1, 1, tzinfo=dt.UTC)),
    "another node's id": certificate(subject=STRANGER.node_id),
    "no node's id": certificate(subject="*"),
    "another kind of key": certificate(key=generate_private_key(SECP256R1())),
}


def received(connection: socket.socket, data: bytes) -> bytes:
    """What comes back before the other side closes."""
    found = b""
    with contextlib.suppress(OSError):
        connection.sendall(data)
        while more := connection.recv(4096):
            found += more
    return found


def test_a_member_is_let_in_by_the_same_way(alone: tuple[Runner, int]) -> None:
    """Or the refusals below would show nothing."""
    assert_let_in(alone[1], certificate())


def assert_let_in(port: int, shown: Credentials) -> None:
    with socket.create_connection((HOST, port), 10) as plain, client_context(shown).wrap_socket(plain) as secure:
        secure.sendall(HELLO + pack(make_admit("r", [1], 1)))
        assert secure.recv(4096)


@pytest.mark.parametrize("shown", CERTIFICATES.values(), ids=CERTIFICATES.keys())
def test_a_wrong_certificate_opens_nothing(alone: tuple[Runner, int], shown: Credentials) -> None:
    with pytest.raises((OSError, AssertionError)):
        assert_let_in(alone[1], shown)
    assert_serves(alone[1])


def test_no_certificate_opens_nothing(alone: tuple[Runner, int]) -> None:
    context = ssl.create_default_context(cadata=credentials().authority.decode())
    context.check_hostname = False
    with socket.create_connection((HOST, alone[1]), 10) as plain, context.wrap_socket(plain) as secure:
        secure.sendall(HELLO)
        with pytest.raises(ssl.SSLError, match=r"(?i)certificate required"):
            secure.recv(4096)
    assert_serves(alone[1])


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2])
def test_an_older_tls_opens_nothing(alone: tuple[Runner, int], version: ssl.TLSVersion) -> None:
    context = client_context(credentials(5))
    context.minimum_version = context.maximum_version = version
    with socket.create_connection((HOST, alone[1]), 10) as plain, pytest.raises(OSError):  # noqa: PT011 - any will do
        context.wrap_socket(plain)
    assert_serves(alone[1])


def test_plain_words_open_nothing(alone: tuple[Runner, int]) -> None:
    with socket.create_connection((HOST, alone[1]), 10) as plain:
        assert b"check" not in received(plain, HELLO + pack(make_admit("check", [1, 2], 4)))
    assert_serves(alone[1])


# ---- malformed handshakes ----


def test_twenty_malformed_handshakes_harm_nobody(alone: tuple[Runner, int]) -> None:
    tried = malformed()
    assert len(tried) == 20
    with Client(alone[1]) as member:
        for data in tried:
            with socket.create_connection((HOST, alone[1]), 10) as stranger:
                stranger.settimeout(1)
                stranger.sendall(data)
                with contextlib.suppress(OSError):
                    stranger.shutdown(socket.SHUT_WR)
                received(stranger, b"")
        member.send(make_admit("r", [1, 2], 5))
        assert len(sampled(member.events_of_all(["r"])["r"])) == 5
    assert_serves(alone[1])


@pytest.mark.timed
def test_a_hundred_who_say_nothing_keep_nobody_out(alone: tuple[Runner, int]) -> None:
    """They cost at most `STRANGERS_MAX` threads, for a few seconds, and a member comes through at once."""
    process = psutil.Process(alone[0].process.pid)
    assert_serves(alone[1])
    before = process.num_threads()
    with contextlib.ExitStack() as held:
        for _ in range(100):
            held.enter_context(socket.create_connection((HOST, alone[1]), 10))
        started = time.monotonic()
        assert_serves(alone[1])
        assert time.monotonic() - started < 2
        assert process.num_threads() <= before + STRANGERS_MAX + 2
    deadline = time.monotonic() + 10
    while process.num_threads() > before:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.timed
def test_one_who_says_nothing_is_sent_away(alone: tuple[Runner, int]) -> None:
    started = time.monotonic()
    with socket.create_connection((HOST, alone[1]), 20) as silent:
        assert received(silent, b"") == b""
    assert HELLO_SECONDS - 1 < time.monotonic() - started < HELLO_SECONDS + 3


@pytest.mark.timed
def test_one_who_dribbles_is_sent_away_too(alone: tuple[Runner, int]) -> None:
    flight, started = first_flight(), time.monotonic()
    with socket.create_connection((HOST, alone[1]), 20) as slow, contextlib.suppress(OSError):
        for place in range(len(flight)):
            slow.sendall(flight[place : place + 1])
            time.sleep(0.2)
            assert time.monotonic() - started < HELLO_SECONDS + 3


def test_a_stage_links_to_no_one_else() -> None:
    """Somebody got hold of the address of the next stage."""
    runner = Runner(make_spec(0, 2))
    runner.wait(Listening)
    context = server_context(credentials(6, OTHER_CODE))
    with socket.create_server((HOST, 0)) as listener:
        runner.tell(ConnectTo((Address(HOST, listener.getsockname()[1]),)))
        failing = threading.Thread(target=runner.wait, args=(PhaseFailed,))
        failing.start()
        listener.settimeout(0.2)
        while failing.is_alive():
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with context.wrap_socket(connection, server_side=True) as secure:
                    assert secure.recv(4096) == b""
    failure = runner.seen[-1]
    assert isinstance(failure, PhaseFailed)
    assert "its certificate is not of this cluster" in failure.reason
    assert runner.wait_end() == 1
    assert "Traceback" not in runner.close()


def test_a_runner_says_nothing_secret(alone: tuple[Runner, int]) -> None:
    """Neither its arguments nor its environment nor its log hold what it was given."""
    process = psutil.Process(alone[0].process.pid)
    told = " ".join([*process.cmdline(), *process.environ().values()])
    assert "PRIVATE KEY" not in told
    assert CODE.text() not in told
