"""Conversations of small clusters, as golden text: `COVEY_UPDATE_GOLDEN=1` rewrites them, and the diff is reviewed."""

import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from simulation.host import Host
from simulation.people import HUGE, LARGE, SMALL
from simulation.trace import Trace
from simulation.world import World

FOLDER = Path(__file__).resolve().parent
GIGABYTE = 10**9


class Story:
    """A world without faults, and what a reader wants to know of it."""

    def __init__(self) -> None:
        self.world = World(Random(1))
        self.lines: list[str] = []
        Trace(self.world, self.lines.append)

    def say(self, sentence: str) -> None:
        self.lines.append(f"-- {sentence}")

    def hosts(self, *names: str, memory: int = 8) -> list[Host]:
        return [self.world.add(name, memory * GIGABYTE) for name in names]

    def go_on(self, duration_ms: int) -> None:
        self.world.run_until(self.world.now_ms + duration_ms)

    def leader(self) -> Host:
        leaders = [host for host in self.world.up() if host.machine and host.machine.leadership.leads]
        assert len(leaders) == 1
        return leaders[0]

    def follower(self) -> Host:
        return next(host for host in self.world.up() if host is not self.leader())


def three_nodes_start_at_once(story: Story) -> None:
    for host in story.hosts("ada", "bea", "cleo"):
        host.start()
    story.go_on(5_000)


def the_leader_dies(story: Story) -> None:
    for host in story.hosts("ada", "bea", "cleo"):
        host.start()
    story.go_on(3_000)
    story.say("the leader is killed: away in under 3 s, followed by another about 1 s later, forgotten after 30 s")
    story.leader().crash()
    story.go_on(35_000)


def a_node_crashes_and_returns(story: Story) -> None:
    ada, bea = story.hosts("ada", "bea")
    ada.start()
    bea.start()
    story.go_on(2_000)
    story.say("a model on both")
    story.world.people.place(ada, SMALL, 2)
    story.go_on(5_000)
    story.say("bea crashes and comes back after 5 s: the same instance is served again, in a new generation")
    bea.crash()
    story.go_on(5_000)
    bea.start()
    story.go_on(12_000)


def a_command_at_a_node_that_does_not_lead(story: Story) -> None:
    for host in story.hosts("ada", "bea"):
        host.start()
    story.say("asked before anybody leads")
    story.world.people.place(story.world.hosts[1], SMALL)
    story.go_on(4_000)
    story.say("asked at a follower")
    story.world.people.place(story.follower(), SMALL)
    story.go_on(4_000)
    follower = story.follower()
    instance_id = next(iter(follower.machine.cluster.instances)) if follower.machine else None
    assert instance_id
    story.say("deleted at a follower, twice")
    story.world.people.delete(follower, instance_id)
    story.go_on(1_000)
    story.world.people.delete(follower, instance_id)
    story.go_on(1_000)


def a_placement_is_refused(story: Story) -> None:
    ada, bea = story.hosts("ada", "bea", memory=4)
    ada.start()
    story.say("more nodes than there are")
    story.world.people.place(ada, SMALL, 2)
    story.go_on(3_000)
    bea.start()
    story.go_on(3_000)
    story.say("more memory than there is")
    story.world.people.place(bea, HUGE)
    story.go_on(500)
    story.say("more nodes than layers")
    story.world.people.place(bea, SMALL, 7)
    story.go_on(500)


def a_lost_node_is_replaced(story: Story) -> None:
    for host in story.hosts("ada", "bea", "cleo"):
        host.start()
    story.go_on(2_000)
    story.world.people.place(story.leader(), LARGE, 2)
    story.go_on(6_000)
    instance = next(iter(story.leader().machine.cluster.instances.values()))  # type: ignore[union-attr]
    lost = story.world.host(instance.stages[1].node_id)
    story.say("the second stage's node is gone for good")
    lost.crash()
    story.go_on(42_000)


def nobody_answers(story: Story) -> None:
    ada, bea = story.hosts("ada", "bea")
    ada.start()
    bea.start()
    story.go_on(2_000)
    follower, leader = story.follower(), story.leader()
    story.say("the leader still hears, but none of its answers arrives")
    story.world.network.cuts.add((leader.node_id, follower.node_id))
    story.world.people.place(follower, SMALL)
    story.go_on(1_000)
    story.say("the way back works again: the repeated request is answered alike")
    story.world.network.cuts.clear()
    story.go_on(1_500)


STORIES: tuple[Callable[[Story], None], ...] = (
    three_nodes_start_at_once,
    the_leader_dies,
    a_node_crashes_and_returns,
    a_command_at_a_node_that_does_not_lead,
    a_placement_is_refused,
    a_lost_node_is_replaced,
    nobody_answers,
)


@pytest.mark.parametrize("tell", STORIES, ids=lambda tell: tell.__name__)
def test_story(tell: Callable[[Story], None]) -> None:
    story = Story()
    tell(story)
    told = "\n".join(line.rstrip() for line in story.lines) + "\n"
    golden = FOLDER / f"{tell.__name__}.txt"
    if os.environ.get("COVEY_UPDATE_GOLDEN"):
        golden.write_text(told)
    assert golden.read_text() == told
