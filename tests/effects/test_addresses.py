"""A person who opens the API to a network is told addresses that can be opened."""

import msgspec
import pytest

from covey.effects.addresses import http_url, local_host, network_hosts
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
    assert network_hosts(host, machine) == elsewhere


def test_addresses_as_a_browser_takes_them() -> None:
    assert http_url("::1", 80) == "http://[::1]:80"
    assert http_url("127.0.0.1", 80) == "http://127.0.0.1:80"
