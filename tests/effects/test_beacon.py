"""Beacons on the loopback interface, and what strangers may put into one."""

import secrets
import threading
import time
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.effects import beacon
from covey.effects.beacon import Beacons, pack, parse
from covey.schema.mesh import Beacon, BeaconHeard, BeaconSetup, MulticastBlocked, MulticastWorks

GOOD = Beacon(protocol=1, cluster="0123456789abcdef", sender="ab" * 16, port=53415, node_count=2, link=0)
HERE = (("lo", "127.0.0.1"),)


@pytest.fixture(autouse=True)
def of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other nodes of this machine are not to be heard, and nobody wants to wait."""
    monkeypatch.setattr(beacon, "PORT", 23500 + secrets.randbelow(100))
    monkeypatch.setattr(beacon, "EAGER_S", (0.0, 0.05))
    monkeypatch.setattr(beacon, "PERIOD_S", 0.1)
    monkeypatch.setattr(beacon, "ANSWER_SPACING_S", 0.01)


def started(sender: str, cluster: str = GOOD.cluster) -> tuple[Beacons, list[object]]:
    told: list[object] = []
    made = Beacons(BeaconSetup(cluster, HERE), sender, 4000, told.append, lambda _: False)
    made.start()
    return made, told


def until(condition: Callable[[], object]) -> None:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < 5
        time.sleep(0.01)


def of_multicast(told: list[object]) -> list[object]:
    """Without the beacons of the tests before, whose threads go on."""
    return [each for each in told if not isinstance(each, BeaconHeard)]


def test_two_hear_each_other_once_in_a_while() -> None:
    _, told_a = started("aa")
    _, told_b = started("bb")
    until(lambda: told_a and told_b)
    time.sleep(0.5)
    assert [(each.beacon.sender, each.address, each.is_linked) for each in told_a] == [("bb", "127.0.0.1", False)]
    assert [each.is_ours_to_dial for each in (*told_a, *told_b)] == [True, False]


def test_what_never_comes_back_is_told_and_so_is_its_return(monkeypatch: pytest.MonkeyPatch) -> None:
    """A firewall on this machine."""
    real = beacon._Link.send
    monkeypatch.setattr(beacon._Link, "send", lambda *_: "")
    _, told = started("aa")
    until(lambda: of_multicast(told))
    monkeypatch.setattr(beacon._Link, "send", real)
    until(lambda: len(of_multicast(told)) > 1)
    assert of_multicast(told) == [MulticastBlocked("lo", ""), MulticastWorks("lo")]


def test_what_can_not_be_sent_is_told_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """What macOS says to a program that may not use the local network."""
    monkeypatch.setattr(beacon._Link, "send", lambda *_: "No route to host")
    _, told = started("aa")
    until(lambda: told)
    time.sleep(0.3)
    assert of_multicast(told) == [MulticastBlocked("lo", "No route to host")]


def test_a_flood_of_senders_is_bounded() -> None:
    made, told = started("aa")
    for number in range(2 * beacon.SENDERS_MAX):
        made._hear(time.monotonic(), msgspec.structs.replace(GOOD, sender=f"{number:x}"), "10.0.0.1")
    assert len(made._senders) <= beacon.SENDERS_MAX
    assert len([each for each in told if isinstance(each, BeaconHeard)]) <= beacon.SENDERS_MAX


def test_there_and_back() -> None:
    assert parse(pack(GOOD)) == GOOD
    later = pack(GOOD)[: len(beacon.BEACON_MAGIC)] + msgspec.msgpack.encode(msgspec.structs.asdict(GOOD) | {"new": [1]})
    assert parse(later) == GOOD  # fields of later versions


@pytest.mark.parametrize(
    "fields",
    [
        {"cluster": "x" * 16}, {"cluster": ""}, {"cluster": "0" * 17}, {"sender": ""}, {"sender": "a" * 33},
        {"sender": "\x1b[31m"}, {"port": 0}, {"port": 65536}, {"node_count": 0}, {"node_count": 10**9},
        {"protocol": 0}, {"protocol": -1},
    ],
)  # fmt: skip
def test_what_no_node_would_say_is_ignored(fields: dict[str, object]) -> None:
    assert parse(pack(msgspec.structs.replace(GOOD, **fields))) is None


@given(st.binary(max_size=600), st.booleans())
def test_rubbish_is_ignored(data: bytes, has_magic: bool) -> None:  # noqa: FBT001
    parsed = parse((beacon.BEACON_MAGIC if has_magic else b"") + data)
    assert parsed is None or isinstance(parsed, Beacon)


def test_threads_do_not_outlive_the_process() -> None:
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "beacon")
