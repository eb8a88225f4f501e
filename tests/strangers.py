"""What somebody without the join code can send to a port of ours: broken handshakes, and certificates of his own."""

import datetime as dt
import random
import ssl
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID, ObjectIdentifier

from covey.effects import trust
from covey.engine.tls import client_context
from covey.schema.trust import Credentials
from tests.credentials import OTHER_CODE, credentials, node

STRANGER = node(6)
PRIVATE_EXTENSION = ObjectIdentifier("1.3.6.1.4.1.55555.1")


def first_flight() -> bytes:
    """What a member says first."""
    outgoing = ssl.MemoryBIO()
    tls = client_context(credentials(5)).wrap_bio(ssl.MemoryBIO(), outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def malformed() -> list[bytes]:
    """Twenty: cut, with bytes changed, with lengths that promise gigabytes, and noise."""
    good, noise = first_flight(), random.Random(0)
    cut = [good[:length] for length in (1, 4, 5, 9, 60, len(good) - 1)]
    changed = [good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :] for place in (0, 1, 5, 9, 43, 80)]
    huge = [
        good[:3] + b"\xff\xff" + good[5:],
        good[:6] + b"\xff\xff\xff" + good[9:],
        b"\x16\x03\x03\x40\x00" + bytes(0x4000),
    ]
    random_bytes = [noise.randbytes(size) for size in (1, 100, 20_000)]
    alerts = [b"\x15\x03\x03\x00\x02\x02\x28", b"\x17\x03\x03\x00\x10" + bytes(16)]
    return cut + changed + huge + random_bytes + alerts


def foreign(member: Credentials) -> dict[str, Credentials]:
    """What a stranger can show to the cluster of `member`, whose public names he knows but none of its keys."""
    own = credentials(6, OTHER_CODE)
    like = _certificate(member)
    return {
        "another cluster's": own,
        "with the authority's name": _shown(like),
        "one bit is wrong": _shown(like, damage=1),
        "expired": _shown(_certificate(member, until=dt.datetime(1971, 1, 1, tzinfo=dt.UTC))),
        "not valid yet": _shown(_certificate(member, since=dt.datetime(9999, 1, 1, tzinfo=dt.UTC))),
        "no node's id": _shown(_certificate(member, subject="*")),
        "a control character for a name": _shown(_certificate(member, subject="\0")),
        "an unknown critical extension": _shown(_certificate(member, extension=b"\0", is_critical=True)),
        "an extension of 60 kB": _shown(_certificate(member, extension=bytes(60_000))),
        "an authority of its own": _shown(_certificate(member, is_authority=True)),
        "a chain of twenty": _shown(like, chain=19),
        "another kind of key": _with_ec_key(member),
    }


def _certificate(
    member: Credentials,
    *,
    subject: str = STRANGER.node_id,
    since: dt.datetime = trust.VALID_FROM,
    until: dt.datetime = trust.VALID_UNTIL,
    extension: bytes = b"",
    is_critical: bool = False,
    is_authority: bool = False,
) -> x509.Certificate:
    builder = _builder(member, subject, STRANGER.key.public_key(), since, until)
    builder = builder.add_extension(x509.BasicConstraints(is_authority, None), critical=True)
    if extension:
        builder = builder.add_extension(x509.UnrecognizedExtension(PRIVATE_EXTENSION, extension), is_critical)
    return builder.sign(STRANGER.key, None)


def _builder(
    member: Credentials, subject: str, key: Any, since: dt.datetime, until: dt.datetime
) -> x509.CertificateBuilder:
    authority = x509.load_pem_x509_certificate(member.authority)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    return x509.CertificateBuilder(authority.subject, name, key, 7, since, until)


def _shown(certificate: x509.Certificate, chain: int = 0, damage: int = 0) -> Credentials:
    encoded = certificate.public_bytes(Encoding.DER)
    damaged = encoded[:-1] + bytes([encoded[-1] ^ damage])
    text = ssl.DER_cert_to_PEM_cert(damaged).encode()
    return _with(text * (1 + chain), STRANGER.key)


def _with_ec_key(member: Credentials) -> Credentials:
    key = generate_private_key(SECP256R1())
    builder = _builder(member, STRANGER.node_id, key.public_key(), trust.VALID_FROM, trust.VALID_UNTIL)
    return _with(builder.sign(key, SHA256()).public_bytes(Encoding.PEM), key)


def _with(certificate: bytes, key: Any) -> Credentials:
    private_key = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return msgspec.structs.replace(credentials(6, OTHER_CODE), certificate=certificate, private_key=private_key)
