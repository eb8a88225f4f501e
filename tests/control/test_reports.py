"""Which figure of its memory a node goes by."""

from random import Random

from msgspec.structs import replace

from covey.control.reports import Held, MemoryFigures
from covey.control.settings import MachineSettings
from covey.schema.cluster import Hardware, RunnerReport
from covey.schema.ids import InstanceId, RunnerId
from covey.schema.runner import RunnerState
from simulation.world import World

FIRST, SECOND = (RunnerId("i.0"), 1), (RunnerId("j.0"), 1)
GIGABYTE = 10**9


def hardware(free_bytes: int) -> Hardware:
    probed = World(Random(1)).add("ada", 8 * GIGABYTE).hardware()
    return replace(probed, memory_bytes_available=free_bytes)


def shown(figures: MemoryFigures, held: Held) -> int:
    found = figures.show(held)
    assert found is not None
    return found.memory_bytes_available


def test_what_a_runner_takes_while_it_loads_is_counted_once() -> None:
    """Where its memory is promised in full, a probe that sees a part of it missing already would count that twice."""
    figures = MemoryFigures(MachineSettings())
    figures.probe(hardware(1000 * GIGABYTE), {}, is_settled=True)
    loading, loaded = {FIRST: 0}, {FIRST: 450 * GIGABYTE}
    assert not figures.is_fresh(loading)
    figures.probe(hardware(700 * GIGABYTE), loading, is_settled=False)
    assert shown(figures, loading) == 1000 * GIGABYTE
    assert figures.free_bytes(loading) == 700 * GIGABYTE  # what is surely free
    assert not figures.is_fresh(loading), "what it says is not the whole truth yet"
    assert shown(figures, loaded) == figures.free_bytes(loaded) == 550 * GIGABYTE
    assert not figures.is_fresh(loaded)
    figures.probe(hardware(540 * GIGABYTE), loaded, is_settled=True)
    assert shown(figures, loaded) == figures.free_bytes(loaded) == 540 * GIGABYTE
    again = {FIRST: 450 * GIGABYTE, SECOND: 50 * GIGABYTE}
    assert figures.free_bytes(again) == 490 * GIGABYTE


def test_a_cache_that_fills_is_told_with_the_memory_it_takes_and_not_before_it_matters() -> None:
    """A probe that is not settled counts it too, and an idle node does not report it more often."""
    figures = MemoryFigures(MachineSettings())
    report = RunnerReport(runner_id=FIRST[0], instance_id=InstanceId("i"), state=RunnerState.READY, attempt=1)

    def look(free_bytes: int, held_bytes: int, *, is_settled: bool = True) -> tuple[int, int]:
        held = {FIRST: held_bytes}
        figures.probe(hardware(free_bytes), held, is_settled=is_settled)
        free = shown(figures, held)
        [steadied] = figures.steady((replace(report, resident_bytes=held_bytes),), {FIRST[0]: FIRST})
        return free, steadied.resident_bytes

    step = 8 * GIGABYTE // 50
    assert look(4 * GIGABYTE, GIGABYTE) == (4 * GIGABYTE, GIGABYTE)
    assert look(4 * GIGABYTE - step + 1, GIGABYTE + step - 1) == (4 * GIGABYTE, GIGABYTE)
    assert look(4 * GIGABYTE - 7, GIGABYTE + step) == (4 * GIGABYTE - 7, GIGABYTE + step)
    assert look(4 * GIGABYTE - step - 7, GIGABYTE + step) == (4 * GIGABYTE - step - 7, GIGABYTE + step)
    assert look(GIGABYTE, 2 * GIGABYTE, is_settled=False) == (3 * GIGABYTE - 7, 2 * GIGABYTE)
    figures.probe(hardware(GIGABYTE), {}, is_settled=True)
    figures.show({})
    assert figures.steady((report,), {FIRST[0]: FIRST}) == (report,)


def test_figures_are_stale_once_a_runner_has_ended() -> None:
    figures = MemoryFigures(MachineSettings())
    assert figures.free_bytes({}) is None
    figures.probe(hardware(99 * GIGABYTE), {FIRST: 0}, is_settled=True)
    assert figures.is_fresh({FIRST: 0})
    assert not figures.is_fresh({})
