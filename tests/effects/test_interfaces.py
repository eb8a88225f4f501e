"""Where the mesh listens."""

import socket
from types import SimpleNamespace

import psutil
import pytest

from covey.effects.interfaces import all_places, is_loopback, is_near, usable

LO = [("lo", "127.0.0.1"), ("lo", "::1")]


@pytest.mark.parametrize(
    "address", ["10.1.2.3", "172.31.0.1", "192.168.178.20", "169.254.7.7", "100.101.102.103", "fd12::5"]
)
def test_private_addresses_are_used(address: str) -> None:
    assert usable([*LO, ("e0", address)], ()) == [("e0", address), *(LO[:1] if ":" in address else [])]


@pytest.mark.parametrize("address", ["8.8.8.8", "172.32.0.1", "100.128.0.1", "2001:db8::1", "fe80::1"])
def test_others_are_not(address: str) -> None:
    assert usable([*LO, ("e0", address)], ()) == LO[:1]  # and a machine alone has still itself


def test_a_person_may_choose() -> None:
    places = [*LO, ("e0", "192.168.0.2"), ("e1", "203.0.113.7"), ("e1", "fe80::1"), ("e2", "10.0.0.2")]
    assert usable(places, ("e1",)) == [("e1", "203.0.113.7")]
    assert usable(places, ("10.0.0.2", "e0")) == [("e0", "192.168.0.2"), ("e2", "10.0.0.2")]
    assert usable(places, ("127.0.0.1",)) == LO[:1]
    assert usable(places, ("gone",)) == LO[:1]


def test_this_machine_has_loopback() -> None:
    assert "127.0.0.1" in {address for _, address in all_places()}


@pytest.mark.parametrize(("host", "is_it"), [("127.0.0.5", True), ("localhost", True), ("::1", True), ("ada", False)])
def test_loopback(host: str, is_it: bool) -> None:  # noqa: FBT001
    assert is_loopback(host) is is_it


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1", True), ("::1", True), ("192.168.3.4", True), ("fd12::1", True), ("fe80::1", True),
        ("100.70.0.1", True), ("8.8.8.8", False), ("2001:4860:4860::8888", False),
    ],
)  # fmt: skip
def test_who_is_near(address: str, *, expected: bool) -> None:
    assert is_near(address) is expected


def test_the_network_of_a_public_address_of_ours_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    own = SimpleNamespace(family=socket.AF_INET, address="203.0.113.7", netmask="255.255.255.0")
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth0": [own]})
    assert [is_near(address) for address in ("203.0.113.200", "203.0.114.1")] == [True, False]
