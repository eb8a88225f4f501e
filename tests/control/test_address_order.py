"""A node has many addresses: which of them another one tries, and in which order."""

import msgspec
import pytest

from covey.control.addresses import ADDRESSES_MAX, ways_to
from covey.schema.cluster import NodeReport
from covey.schema.ids import NodeId
from covey.schema.runner import EVERYWHERE, Address
from tests.api.fake_backend import hardware

LISTENER = Address(EVERYWHERE, 5)


def report(name: str, *addresses: str, machine: str | None = None) -> NodeReport:
    interfaces = (("lo", "127.0.0.1"), ("lo", "::1"), *((f"eth{i}", each) for i, each in enumerate(addresses)))
    return NodeReport(
        node_id=NodeId(name),
        boot=1,
        sequence=1,
        name=name,
        version="1",
        api_address=None,
        hardware=msgspec.structs.replace(hardware(machine or name), interfaces=interfaces),
        downloads=(),
        runners=(),
    )


def hosts(there: NodeReport, here: NodeReport) -> list[str]:
    return [way.host for way in ways_to(LISTENER, there, here)]


@pytest.mark.parametrize(
    ("theirs", "ours", "expected"),
    [
        (["10.0.0.7", "192.168.1.7"], ["192.168.1.2"], ["192.168.1.7", "10.0.0.7"]),
        (["192.168.1.7", "169.254.3.3"], ["10.0.0.2", "169.254.9.9"], ["169.254.3.3", "192.168.1.7"]),
        (["fe80::7", "fd00:1::7", "192.168.1.7"], ["fd00:1::2"], ["fd00:1::7", "192.168.1.7"]),
        (["2001:db8:1::7", "192.168.1.7"], ["2001:db8:2::1", "192.168.1.2"], ["192.168.1.7", "2001:db8:1::7"]),
        (["172.17.0.1", "192.168.1.7"], ["172.17.0.1", "192.168.1.2"], ["192.168.1.7"]),
        ([], ["192.168.1.2"], []),
    ],
    ids=["the same network first", "a cable", "IPv6 only", "both kinds", "Docker's bridge is ourselves", "none"],
)
def test_the_order(theirs: list[str], ours: list[str], expected: list[str]) -> None:
    assert hosts(report("b", *theirs), report("a", *ours)) == expected


def test_what_is_no_address_is_passed_over() -> None:
    there = report("b", "", "eth0", "192.168.1.300", "192.168.1.7", "fd00::1::2", "10.0.0.7/24")
    assert hosts(there, report("a", "nonsense", "192.168.1.2")) == ["192.168.1.7"]


def test_one_machine_is_reached_by_loopback_first() -> None:
    there, here = report("b", "10.0.0.7", machine="m"), report("a", "10.0.0.7", machine="m")
    assert hosts(there, here) == ["127.0.0.1"]
    assert hosts(here, here) == ["127.0.0.1"]


def test_two_machines_that_say_they_are_one_still_meet() -> None:
    """Clones of one disk image."""
    assert hosts(report("b", "10.0.0.7", machine="m"), report("a", "10.0.0.2", machine="m")) == [
        "127.0.0.1",
        "10.0.0.7",
    ]


def test_one_address_is_one_way() -> None:
    assert ways_to(Address("10.0.0.7", 5), None, None) == (Address("10.0.0.7", 5),)
    assert ways_to(None, report("b"), report("a")) == ()


def test_there_is_a_bound() -> None:
    many = [f"10.0.0.{number}" for number in range(1, 50)]
    assert len(hosts(report("b", *many), report("a", "10.0.1.1"))) == ADDRESSES_MAX
