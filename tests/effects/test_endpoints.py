"""How people write addresses of peers."""

import pytest

from covey.effects.endpoints import AddressError, endpoint, mesh_port, peer_address


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("127.0.0.5", "tls/127.0.0.5:53415"),
        ("localhost:52420", "tls/localhost:53420"),
        ("[::1]:52420", "tls/::1:53420"),
        ("::1", "tls/::1:53415"),
        ("localhost:65000", "tls/localhost:64000"),
        ("[fd00::2]:52420", "tls/fd00::2:53420"),
        ("studio.local", "tls/studio.local:53415"),
    ],
)
def test_addresses(written: str, expected: str) -> None:
    assert endpoint(*peer_address(written)) == expected


@pytest.mark.parametrize(
    "written",
    [
        "",
        ":1",
        "host:",
        "host:x",
        "host:0",
        "host:70000",
        "[]:80",
        "my..host",
        ".local",
        "a" * 64,
        "a.b..:80",
        "host:²",
        "host:" + "1" * 5000,
    ],
)
def test_what_is_no_address(written: str) -> None:
    with pytest.raises(AddressError, match="HOST:PORT"):
        peer_address(written)


def test_any_port_stays_any() -> None:
    assert mesh_port(0) == 0
