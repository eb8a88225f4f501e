"""What beacons mean."""

import msgspec
import pytest

from covey.effects.neighbours import OTHERS_MAX, Neighbours, cluster_name
from covey.schema.mesh import MESH_PROTOCOL, Beacon, BeaconHeard

OURS, OTHER = "0123456789abcdef", "fedcba9876543210"
BEACON = Beacon(protocol=MESH_PROTOCOL, cluster=OURS, sender="aa", port=53415, node_count=2, link=0)


def heard(address: str = "10.0.0.2", *, linked: bool = False, dial: bool = True, **fields: object) -> BeaconHeard:
    return BeaconHeard(msgspec.structs.replace(BEACON, **fields), address, linked, dial)


def test_another_cluster_is_told_until_it_is_gone() -> None:
    neighbours = Neighbours(OURS)
    neighbours.hear(0, heard(cluster=OTHER))
    (sentence,) = neighbours.notices(1)
    assert sentence.startswith(
        f"another cluster of Covey is here: {cluster_name(OTHER)} (2 nodes). To join: covey up --j"
    )
    neighbours.hear(2, heard(cluster=OTHER, node_count=1))
    assert "(1 node)" in neighbours.notices(2)[0]
    assert neighbours.notices(20) == []
    assert neighbours.dials(2) == []


def test_many_others_are_few_sentences() -> None:
    neighbours = Neighbours(OURS)
    for number in range(100):
        neighbours.hear(0, heard(cluster=f"{number:016x}"))
        neighbours.hear(0, heard(f"10.0.0.{number}", protocol=MESH_PROTOCOL + 1 + number))
    assert len(neighbours.notices(0)) == 2 * OTHERS_MAX


@pytest.mark.parametrize(("protocol", "word"), [(MESH_PROTOCOL + 1, "a newer"), (MESH_PROTOCOL - 1, "an older")])
def test_another_version(protocol: int, word: str) -> None:
    neighbours = Neighbours(OURS)
    neighbours.hear(0, heard(protocol=protocol))
    assert neighbours.notices(0) == [
        f"Covey at 10.0.0.2 is {word} version, and the two can't work together; update the older one"
    ]


def test_a_node_of_ours_that_scouting_does_not_find_is_dialled() -> None:
    neighbours = Neighbours(OURS)
    for second in range(0, 12, 3):
        neighbours.hear(second, heard())
    assert neighbours.dials(8.9) == []
    assert neighbours.dials(9) == ["tls/10.0.0.2:53415"]
    neighbours.hear(12, heard(linked=True))
    assert neighbours.dials(12) == []


def test_over_ipv6_sooner_and_by_one_of_two() -> None:
    """Zenoh does not scout over IPv6."""
    first, second = Neighbours(OURS), Neighbours(OURS)
    first.hear(0, heard("fd00::2"))
    second.hear(0, heard("fd00::1", dial=False))
    assert first.dials(2) == ["tls/fd00::2:53415"]
    assert second.dials(6) == []
    assert second.dials(7) == ["tls/fd00::1:53415"]  # if the other one can't


def test_what_is_silent_is_not_dialled() -> None:
    neighbours = Neighbours(OURS)
    neighbours.hear(0, heard())
    assert neighbours.dials(16) == []


def test_names_are_two_words() -> None:
    names = {cluster_name(f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}") for number in range(500)}
    assert len(names) > 450
    assert all(name.replace("-", "").isalpha() and name.count("-") == 1 for name in names)
