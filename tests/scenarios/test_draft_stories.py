"""A model with a draft, and one with a cache in 16-bit floats, as golden text, in the way of `test_scenarios`."""

from collections.abc import Callable

import pytest

from covey.schema.model import KvCacheType
from simulation.people import LARGE, SMALL
from tests.golden import check
from tests.scenarios.test_scenarios import FOLDER, Story


def a_head_with_a_draft_is_lost(story: Story) -> None:
    """Its node alone has the draft's file, so the next head fetches that; what the others hold stays."""
    ada, bea, cleo = story.hosts("ada", "bea", "cleo")
    for host in (ada, bea, cleo):
        host.start()
    story.go_on(3_000)
    story.world.people.place(ada, LARGE, 2, draft=SMALL)
    story.go_on(12_000)
    story.status(ada)
    ada.crash()
    story.go_on(20_000)
    story.status(bea)


def a_node_with_a_cache_in_halves_is_lost(story: Story) -> None:
    """Who takes its part is told of the cache, too."""
    ada, bea, cleo = story.hosts("ada", "bea", "cleo")
    for host in (ada, bea, cleo):
        host.start()
    story.go_on(3_000)
    story.world.people.place(ada, LARGE, 2, kv_cache=KvCacheType.F16)
    story.go_on(12_000)
    story.status(ada)
    bea.crash()
    story.go_on(20_000)
    story.status(ada)


@pytest.mark.parametrize("tell", [a_head_with_a_draft_is_lost, a_node_with_a_cache_in_halves_is_lost])
def test_draft_story(tell: Callable[[Story], None]) -> None:
    story = Story()
    tell(story)
    check(FOLDER / f"{tell.__name__}.txt", "\n".join(line.rstrip() for line in story.lines) + "\n")
