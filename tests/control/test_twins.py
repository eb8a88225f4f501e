"""Two living nodes with one identity: the later one notices and stops; old messages of one's own are no twin."""

from covey.control.twins import LIVING_MS, Twins
from covey.schema.cluster import Heartbeat
from covey.schema.ids import NodeId

ME = NodeId("m")


def beat(sequence: int, life: str, age_ms: int = 0) -> Heartbeat:
    return Heartbeat(ME, 1, sequence, (), None, "", life=life, age_ms=age_ms)


def test_a_life_that_goes_on_is_a_twin() -> None:
    twins = Twins("mine")
    assert not twins.hear(0, beat(1, "other"))
    assert not twins.hear(LIVING_MS - 1, beat(2, "other"))
    assert twins.hear(LIVING_MS, beat(3, "other"))


def test_late_messages_of_an_earlier_life_are_none() -> None:
    twins = Twins("mine")
    for now_ms in (0, 500, LIVING_MS, 2 * LIVING_MS):
        assert not twins.hear(now_ms, beat(9, "earlier"))
    assert not twins.hear(0, beat(1, "mine"))


def test_exactly_one_of_two_goes_on() -> None:
    for mine_ms, other_ms in ((0, 5), (5, 0), (3, 3)):
        first = Twins("a").is_older(mine_ms, beat(1, "b", other_ms))
        second = Twins("b").is_older(other_ms, beat(1, "a", mine_ms))
        assert first != second
