"""Conversations of small clusters, as golden text: `COVEY_UPDATE_GOLDEN=1` rewrites them, and the diff is reviewed."""

import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from covey.control.routing import instance_status
from covey.schema.cluster import Claim, CommandRequest, DeleteInstance, Entry, Heartbeat, IntentUpdate, Version
from covey.schema.ids import InstanceId
from simulation.faults import Faults
from simulation.host import Host
from simulation.people import HUGE, LARGE, SMALL
from simulation.trace import Trace
from simulation.world import World

FOLDER = Path(__file__).resolve().parent
GIGABYTE = 10**9
FLOOD = 1000


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

    def cut(self, *one_side: Host) -> None:
        """No message passes between these and all others."""
        names = ", ".join(host.name for host in one_side)
        self.world.note(f"{names} cut off")
        others = [host for host in self.world.hosts if host not in one_side]
        for host in one_side:
            for other in others:
                self.world.network.cuts |= {(host.node_id, other.node_id), (other.node_id, host.node_id)}

    def heal(self) -> None:
        self.world.note("all cables are back")
        self.world.network.cuts.clear()

    def status(self, *hosts: Host) -> None:
        """What each of them says of the instances."""
        for host in hosts:
            assert host.machine
            state = host.machine.state(self.world.now_ms)
            said = [
                f"{each.card.model_id} on {'+'.join(self.world.host(stage.node_id).name for stage in each.stages)}: "
                f"{instance_status(state, each).text}"
                for each in state.instances
            ]
            self.say(f"{host.name} says: {'; '.join(said) or 'no instance'}")

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


def the_leader_leaves(story: Story) -> None:
    for host in story.hosts("ada", "bea", "cleo"):
        host.start()
    story.go_on(2_000)
    story.world.people.place(story.leader(), SMALL)
    story.go_on(5_000)
    story.say("the leader leaves, and takes its runner along: nobody waits for it, another leads and serves the model")
    story.leader().leave()
    story.go_on(9_000)


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


def a_lost_node_comes_back_and_takes_its_part_again(story: Story) -> None:
    """Its neighbours take its layers on beside theirs, and give them back when somebody asks for that. (Unasked they do
    when the model rests, which it never does here.)
    """
    for host in story.hosts("ada", "bea", "cleo"):
        host.start()
    story.go_on(2_000)
    story.world.people.place(story.leader(), LARGE, 3)
    story.go_on(8_000)
    instance = next(iter(story.leader().machine.cluster.instances.values()))  # type: ignore[union-attr]
    lost = story.world.host(instance.stages[1].node_id)
    story.say("the node of the second stage is gone: the two others keep what they have, and share its layers")
    lost.crash()
    story.go_on(20_000)
    story.say("it is back, and somebody asks for the model to be placed as it would be now")
    lost.start()
    story.go_on(25_000)
    standing = next(iter(story.leader().machine.state(0).instances))  # type: ignore[union-attr]
    story.world.people.rebalance(lost, standing.instance_id)
    story.go_on(32_000)


def the_power_is_cut(story: Story) -> None:
    ada, bea = story.hosts("ada", "bea")
    ada.start()
    bea.start()
    story.go_on(2_000)
    story.world.people.place(ada, SMALL, 2)
    story.go_on(5_000)
    story.say("the power is cut; ada is back after 2 s and waits for bea, who takes 20 s")
    ada.crash()
    bea.crash()
    story.go_on(2_000)
    ada.start()
    story.go_on(18_000)
    bea.start()
    story.go_on(6_000)


def the_power_is_cut_and_one_node_does_not_come_back(story: Story) -> None:
    ada, bea = story.hosts("ada", "bea")
    ada.start()
    bea.start()
    story.go_on(2_000)
    story.world.people.place(ada, SMALL, 1)
    story.go_on(500)
    story.world.people.place(ada, SMALL, 2)
    story.go_on(5_000)
    story.say("the power is cut; bea stays away: after 30 s its instance is placed again if it fits what is left")
    ada.crash()
    bea.crash()
    story.go_on(1_000)
    ada.start()
    story.go_on(36_000)


def a_disk_is_full(story: Story) -> None:
    for host in story.hosts("ada", "bea"):
        host.start()
    story.go_on(2_000)
    story.say("the follower's disk is full: the answer says that there is one copy only")
    story.follower().disk.is_full = True
    story.world.people.place(story.leader(), SMALL)
    story.go_on(5_000)
    story.say("the leader's too: refused, and nothing has happened")
    story.leader().disk.is_full = True
    story.world.people.place(story.leader(), SMALL)
    story.go_on(1_000)
    story.say("there is room again")
    for host in story.world.hosts:
        host.disk.is_full = False
    story.world.people.place(story.leader(), SMALL)
    story.go_on(5_000)


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


def place_over(story: Story, at: Host, node_count: int) -> None:
    story.world.people.place(at, LARGE, node_count)
    story.go_on(8_000)
    story.status(at)


def the_leader_is_stopped_while_it_holds_a_shard(story: Story) -> None:
    ada, bea, cleo = story.hosts("ada", "bea", "cleo")
    for host in (ada, bea, cleo):
        host.start()
    story.go_on(3_000)
    leader = story.leader()
    place_over(story, leader, 3)
    story.say("the leader's process is stopped: the others follow another, and place the model again without it")
    leader.sleep(story.world.now_ms + 60_000)
    story.go_on(55_000)
    story.status(*(host for host in (ada, bea, cleo) if host is not leader))
    story.say("it goes on: it decides nothing before it has heard the others, and ends what it held")
    story.go_on(20_000)
    story.status(ada, bea, cleo)


def the_leaders_cable_is_cut_while_it_holds_a_shard(story: Story) -> None:
    ada, bea, cleo = story.hosts("ada", "bea", "cleo")
    for host in (ada, bea, cleo):
        host.start()
    story.go_on(3_000)
    leader = story.leader()
    place_over(story, leader, 3)
    story.say("its cable is cut for 20 s: nothing is placed again, and the same instance is served afterwards")
    story.cut(leader)
    story.go_on(20_000)
    story.heal()
    story.go_on(15_000)
    story.status(ada, bea, cleo)
    story.say("its cable is cut for a minute: both sides place the model on what they have")
    story.cut(leader)
    story.go_on(60_000)
    story.status(ada, bea, cleo)
    story.say("the cable is back: of the two one stays, and it was serving all the time")
    story.heal()
    story.go_on(15_000)
    story.status(ada, bea, cleo)


def a_laptop_sleeps_and_wakes(story: Story) -> None:
    desk, laptop = story.hosts("desk", "laptop")
    desk.start()
    laptop.start()
    story.go_on(3_000)
    place_over(story, desk, 2)
    story.say("a nap of 8 s, too short for its work to be given away: the same instance is served again")
    laptop.sleep(story.world.now_ms + 8_000)
    story.go_on(25_000)
    story.status(desk, laptop)
    story.say("a night: the model does not wait for the laptop")
    laptop.sleep(story.world.now_ms + 8 * 3_600_000)
    story.go_on(8 * 3_600_000 - 1)
    story.status(desk)
    story.say("in the morning it takes part again, and changes nothing that works")
    story.go_on(20_000)
    story.status(desk, laptop)


def a_laptop_wakes_elsewhere_four_times(story: Story) -> None:
    desk, laptop, tower = story.hosts("desk", "laptop", "tower")
    for host in (desk, laptop, tower):
        host.start()
    story.go_on(3_000)
    place_over(story, desk, 3)
    for day in range(1, 5):
        story.say(f"day {day}: the laptop wakes far from home, alone")
        story.cut(laptop)
        laptop.sleep(story.world.now_ms + 40_000)
        story.go_on(120_000)
        story.status(laptop, desk)
        story.say(f"day {day}: and is at home again")
        laptop.sleep(story.world.now_ms + 5_000)
        story.go_on(4_000)
        story.heal()
        story.go_on(20_000)
        story.status(desk, laptop)


def a_partition_with_commands_on_both_sides(story: Story) -> None:
    ada, bea, cleo, dora = story.hosts("ada", "bea", "cleo", "dora")
    for host in (ada, bea, cleo, dora):
        host.start()
    story.go_on(3_000)
    place_over(story, ada, 4)
    instance_id = next(iter(ada.machine.cluster.instances))  # type: ignore[union-attr]
    story.say("two and two; each side places a model, and one side deletes the instance that both had")
    story.cut(ada, bea)
    story.go_on(5_000)
    story.world.people.place(ada, SMALL)
    story.world.people.place(dora, SMALL, 2)
    story.go_on(40_000)
    story.world.people.delete(cleo, instance_id)
    story.go_on(10_000)
    story.status(ada, dora)
    story.say("the sides meet: all that was placed is there, what was deleted is gone, nobody's answer was untrue")
    story.heal()
    story.go_on(20_000)
    story.status(ada, bea, cleo, dora)


def one_link_of_three_is_missing(story: Story) -> None:
    ada, bea, cleo = story.hosts("ada", "bea", "cleo")
    story.world.network.cuts |= {(ada.node_id, cleo.node_id), (cleo.node_id, ada.node_id)}
    for host in (ada, bea, cleo):
        host.start()
    story.go_on(6_000)
    story.say("a model over two: never over ada and cleo, which do not see each other")
    place_over(story, bea, 2)
    story.say("over three: refused")
    story.world.people.place(bea, SMALL, 3)
    story.go_on(3_000)
    story.status(ada, bea, cleo)


def a_data_folder_is_copied_to_a_second_machine(story: Story) -> None:
    ada, bea = story.hosts("ada", "bea")
    ada.start()
    bea.start()
    story.go_on(3_000)
    place_over(story, ada, 2)
    copy = story.world.copy(ada, "copy of ada")
    story.say("a machine starts with a copy of ada's folder: it stops, ada goes on, and bea believes ada")
    copy.start()
    story.go_on(20_000)
    story.status(ada, bea)


def other_programs_take_the_memory(story: Story) -> None:
    ada, bea = story.hosts("ada", "bea")
    ada.start()
    story.go_on(3_000)
    story.world.faults = Faults(fetch_ms_max=2_000)
    story.say("the file is still coming when somebody opens other programs on ada: the model waits for them to end")
    story.world.people.place(ada, LARGE)
    story.go_on(300)
    ada.greed_bytes = 5 * GIGABYTE
    story.go_on(30_000)
    story.status(ada)
    ada.greed_bytes = 0
    story.go_on(8_000)
    story.status(ada)
    story.say("the same again, but they stay, and then bea comes: after a while the model is placed there")
    ada.greed_bytes = 5 * GIGABYTE
    ada.crash()
    ada.start()
    story.go_on(30_000)
    story.status(ada)
    bea.start()
    story.go_on(60_000)
    story.status(ada, bea)


def clocks_that_disagree(story: Story) -> None:
    """Nothing but the number of a node's start comes from its clock, and that is compared with its own ones only."""
    ada, bea, cleo = story.hosts("ada", "bea", "cleo")
    ada.boot, bea.boot, cleo.boot = 1_795_000_000, 1_795_000_600, 0
    story.say("ada's clock is right, bea's is ten minutes ahead, cleo has none: its starts are 1, 2, 3")
    for host in (ada, bea, cleo):
        host.start()
    story.go_on(3_000)
    place_over(story, ada, 3)
    story.status(cleo)
    story.say("cleo and bea start anew; bea's clock was set right, so its starts are counted on")
    for host in (cleo, bea):
        host.crash()
        host.start()
    story.go_on(30_000)
    story.status(ada, bea, cleo)


def a_member_floods(story: Story) -> None:
    """It has the code, so it is heard; what it says is odd, and much."""
    ada, bea, cleo = story.hosts("ada", "bea", "cleo")
    for host in (ada, bea, cleo):
        host.start()
    story.go_on(3_000)
    place_over(story, ada, 2)
    leader = story.leader()
    flooder = next(host for host in (cleo, bea, ada) if host is not leader)
    told = len(story.lines)
    far = 2**63
    for number in range(FLOOD):
        command = DeleteInstance(InstanceId(f"flood-{number}"))
        story.world.send(flooder, leader.node_id, CommandRequest(f"flood-{number}", flooder.node_id, command))
        entry = Entry(None, Version(far + number, flooder.node_id))
        story.world.publish(flooder, IntentUpdate(flooder.node_id, {f"wish/flood-{number}": entry}))
        story.world.publish(flooder, beat(flooder, number, Claim(far + number, flooder.node_id)))
    story.go_on(1_000)
    answered = sum("> to" in line and "answer to flood" in line for line in story.lines)
    del story.lines[told:]
    story.say(f"{flooder.name} sends {FLOOD} commands, changes and claims to lead with counters of the far future")
    story.say(f"{answered} are answered; {story.leader().name} leads; another's command is answered as ever")
    story.world.people.place(next(host for host in (ada, bea, cleo) if host not in (leader, flooder)), SMALL)
    story.go_on(5_000)
    story.status(ada, bea, cleo)
    assert all(host.machine and host.machine.cluster.counter < far for host in (ada, bea, cleo))


def beat(host: Host, number: int, claim: Claim) -> Heartbeat:
    assert host.machine
    return Heartbeat(host.node_id, host.boot, 1000 + number, (), claim, "", life=f"{host.name} {host.boot}")


STORIES: tuple[Callable[[Story], None], ...] = (
    three_nodes_start_at_once,
    the_leader_dies,
    the_leader_leaves,
    a_node_crashes_and_returns,
    a_command_at_a_node_that_does_not_lead,
    a_placement_is_refused,
    a_lost_node_is_replaced,
    a_lost_node_comes_back_and_takes_its_part_again,
    nobody_answers,
    the_leader_is_stopped_while_it_holds_a_shard,
    the_leaders_cable_is_cut_while_it_holds_a_shard,
    a_laptop_sleeps_and_wakes,
    a_laptop_wakes_elsewhere_four_times,
    a_partition_with_commands_on_both_sides,
    one_link_of_three_is_missing,
    other_programs_take_the_memory,
    a_data_folder_is_copied_to_a_second_machine,
    the_power_is_cut,
    the_power_is_cut_and_one_node_does_not_come_back,
    a_disk_is_full,
    clocks_that_disagree,
    a_member_floods,
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
