"""A person who opens the API to a network is told addresses that can be opened."""

import socket

import msgspec
import pytest

from covey.effects.addresses import http_url, is_local, local_host, network_hosts, routed_hosts
from tests.api.fake_backend import hardware

INTERFACES = (
    ("eth0", "192.168.1.5"),
    ("eth0", "fd12::5"),
    ("eth0", "fe80::1"),
    ("lo", "127.0.0.1"),
    ("lo", "::1"),
    ("wlan0", "10.0.0.9"),
)


@pytest.mark.parametrize(
    ("host", "here", "elsewhere"),
    [
        ("127.0.0.1", "127.0.0.1", ()),
        ("localhost", "localhost", ()),
        ("192.168.1.5", "192.168.1.5", ("192.168.1.5",)),
        ("0.0.0.0", "127.0.0.1", ("10.0.0.9", "192.168.1.5")),  # noqa: S104 - nobody listens
        ("::", "::1", ("10.0.0.9", "192.168.1.5", "fd12::5")),
    ],
)
def test_where_a_listener_is_reached(host: str, here: str, elsewhere: tuple[str, ...]) -> None:
    machine = msgspec.structs.replace(hardware("m"), interfaces=INTERFACES)
    assert local_host(host) == here
    assert network_hosts(host, machine, ()) == elsewhere


BEHIND_CONTAINERS = (
    ("br-7f3a", "172.18.0.1"),
    ("docker0", "172.17.0.1"),
    ("docker0", "fd17::1"),
    ("eth0", "192.168.1.5"),
    ("eth0", "fd12::5"),
    ("lo", "127.0.0.1"),
    ("usb0", "169.254.3.4"),
    ("virbr0", "192.168.0.1"),
    ("wlan0", "10.0.0.9"),
)


@pytest.mark.parametrize(
    ("routed", "expected"),
    [
        ((), ("10.0.0.9", "192.168.1.5", "fd12::5", "169.254.3.4", "172.17.0.1", "172.18.0.1", "192.168.0.1")),
        (("192.168.1.5", "fd12::5"), ("192.168.1.5", "10.0.0.9", "fd12::5", "169.254.3.4")),
        (("172.18.0.1",), ("172.18.0.1", "10.0.0.9", "192.168.1.5", "fd12::5")),  # a bridge of one's own making
        (("203.0.113.9",), ("10.0.0.9", "192.168.1.5")),  # an interface that came up only now
    ],
)
def test_the_address_that_others_are_told_first_is_one_that_they_can_reach(
    routed: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    machine = msgspec.structs.replace(hardware("m"), interfaces=BEHIND_CONTAINERS)
    found = network_hosts("::", machine, routed)
    assert found[: len(expected)] == expected
    assert len(found) == len(BEHIND_CONTAINERS) - 1


def test_what_the_routes_say_are_addresses_of_this_machine() -> None:
    for host in routed_hosts():
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
            listener.bind((host, 0))  # raises where it is another's


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "127.255.0.9", "::1", "localhost", "LocalHost"])
def test_only_this_machine_reaches_itself(host: str) -> None:
    assert is_local(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "fe80::1", "attic.local", "128.0.0.1"])  # noqa: S104
def test_others_reach_what_is_not_local(host: str) -> None:
    assert not is_local(host)


def test_addresses_as_a_browser_takes_them() -> None:
    assert http_url("::1", 80) == "http://[::1]:80"
    assert http_url("127.0.0.1", 80) == "http://127.0.0.1:80"
