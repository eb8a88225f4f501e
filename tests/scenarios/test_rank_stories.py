"""Layers that nodes share, as golden text, in the way of `test_scenarios`."""

from collections.abc import Callable

import pytest

from simulation.people import SMALL
from tests.golden import check
from tests.scenarios.test_scenarios import FOLDER, Story


def a_rank_is_lost_and_replaced_and_then_there_is_none_to_replace_it(story: Story) -> None:
    """Another node takes the place of the first one; after the second loss one node holds all layers alone."""
    ada, bea, cleo = story.hosts("ada", "bea", "cleo")
    for host in (ada, bea, cleo):
        host.start()
    story.go_on(3_000)
    story.world.people.place(ada, SMALL, rank_count=2)
    story.go_on(10_000)
    story.status(ada)
    assert ada.machine
    holders = [story.world.host(stage.node_id) for stage in next(iter(ada.machine.cluster.instances.values())).stages]
    lost = next(host for host in holders if host is not ada)
    lost.crash()
    story.go_on(15_000)
    story.status(ada)
    next(host for host in (bea, cleo) if host is not lost).crash()
    story.go_on(15_000)
    story.status(ada)


@pytest.mark.parametrize("tell", [a_rank_is_lost_and_replaced_and_then_there_is_none_to_replace_it])
def test_rank_story(tell: Callable[[Story], None]) -> None:
    story = Story()
    tell(story)
    check(FOLDER / f"{tell.__name__}.txt", "\n".join(line.rstrip() for line in story.lines) + "\n")
