"""Two devices that were given the same code trust each other, and nobody else; no clock is needed for it."""

import datetime as dt
import hashlib
import ipaddress
from collections.abc import Sequence

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from covey.control.join_code import JoinCode
from covey.effects.identity import Identity, node_id_of
from covey.effects.trust import OPEN_CODE, make_credentials, new_join_code
from covey.schema.trust import Credentials

CODE = JoinCode(bytes(range(16)))


def identity() -> Identity:
    key = Ed25519PrivateKey.generate()
    return Identity(node_id_of(key), 1, key)


def pem(data: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(data)


def test_what_is_shared_is_the_same_on_every_node() -> None:
    first, second = make_credentials(CODE, identity()), make_credentials(CODE, identity())
    for field in ("authority", "cluster_id", "scouting_group", "scouting_port", "mesh_key"):
        assert getattr(first, field) == getattr(second, field)
    assert first.certificate != second.certificate


def test_what_is_derived_stays_so() -> None:
    """A node of the next version joins with the same code."""
    credentials = make_credentials(CODE, identity())
    shown = (credentials.cluster_id, credentials.scouting_group, credentials.scouting_port)
    assert shown == ("e4ec72c8c3ebb80d", "239.255.225.241", 20255)
    digest = "40dc461960a6e74949a6632497052e82fe47f014aa05fbc30f422e14463c6c77"
    assert hashlib.sha256(credentials.authority).hexdigest() == digest


def clusters() -> Sequence[Credentials]:
    mine = identity()
    return [
        make_credentials(CODE, mine),
        make_credentials(CODE, mine, "demo"),
        make_credentials(OPEN_CODE, mine),
        make_credentials(new_join_code(), mine),
    ]


def test_clusters_share_nothing() -> None:
    for field in ("authority", "cluster_id", "certificate", "mesh_key"):
        assert len({getattr(each, field) for each in clusters()}) == 4
    for each in clusters():
        assert ipaddress.ip_address(each.scouting_group).is_multicast
        assert 20000 <= each.scouting_port < 30000


@pytest.mark.parametrize("year", [1970, 2026, 2049, 2050, 9999])
def test_no_clock_is_needed(year: int) -> None:
    """A small board without a battery believes that it is 1970."""
    credentials = make_credentials(CODE, identity())
    now = dt.datetime(year, 1, 1, 0, 0, 1, tzinfo=dt.UTC)
    for certificate in (pem(credentials.certificate), pem(credentials.authority)):
        assert certificate.not_valid_before_utc < now < certificate.not_valid_after_utc


def test_the_certificate_is_the_authoritys_and_no_other() -> None:
    mine = identity()
    credentials = make_credentials(CODE, mine)
    pem(credentials.certificate).verify_directly_issued_by(pem(credentials.authority))
    with pytest.raises(ValueError, match="match"):
        pem(credentials.certificate).verify_directly_issued_by(pem(make_credentials(OPEN_CODE, mine).authority))


def test_secrets_do_not_show_themselves() -> None:
    credentials = make_credentials(CODE, identity())
    assert "PRIVATE" not in f"{credentials!r} {credentials}"
