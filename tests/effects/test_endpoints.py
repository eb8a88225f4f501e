"""How people write addresses of peers."""

import pytest

from covey.effects.endpoints import AddressError, endpoint, mesh_port, peer_address


@pytest.mark.parametrize(
    ("written", "protocol", "expected"),
    [
        ("127.0.0.5", "tcp", "tcp/127.0.0.5:53415"),
        ("localhost:52420", "tcp", "tcp/localhost:53420"),
        ("[::1]:52420", "tcp", "tcp/[::1]:53420"),
        ("::1", "tcp", "tcp/[::1]:53415"),
        ("localhost:65000", "tcp", "tcp/localhost:64000"),
        ("[fd00::2]:52420", "tls", "tls/fd00::2:53420"),
        ("studio.local", "tls", "tls/studio.local:53415"),
    ],
)
def test_addresses(written: str, protocol: str, expected: str) -> None:
    assert endpoint(protocol, *peer_address(written)) == expected


@pytest.mark.parametrize("written", ["", ":1", "host:", "host:x", "host:0", "host:70000", "[]:80"])
def test_what_is_no_address(written: str) -> None:
    with pytest.raises(AddressError, match="HOST:PORT"):
        peer_address(written)


def test_any_port_stays_any() -> None:
    assert mesh_port(0) == 0
