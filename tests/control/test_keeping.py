"""What was accepted outlives a power cut: on disk first, then in force, then on a second disk, then answered."""

from random import Random

from covey.control.machine import Machine
from covey.control.settings import MachineSettings
from covey.schema.cluster import (
    Accepted,
    CommandOutcome,
    DeleteInstance,
    Entry,
    Heartbeat,
    IntentKept,
    IntentUpdate,
    PlaceModel,
    Refused,
    Version,
)
from covey.schema.ids import InstanceId, NodeId
from covey.schema.machine import (
    AnswerCommand,
    CommandSubmitted,
    DeadlinePassed,
    Effect,
    EntriesKept,
    HardwareProbed,
    Input,
    KeepEntries,
    KeepingFailed,
    LeaveRequested,
    Left,
    MessageReceived,
    Publish,
    SendTo,
    Started,
    StartFetch,
)
from simulation.people import SMALL
from simulation.world import World

ADA, BEA = NodeId("a" * 32), NodeId("b" * 32)
PLACE = CommandSubmitted("c", PlaceModel(card=SMALL))
DELETED = {"wish/x": Entry(None, Version(7, BEA))}


class Rig:
    """Ada's machine, fed by hand; it leads. With `bea` there is a second node that does not."""

    def __init__(self, *, bea: bool, restored: dict[str, Entry] | None = None) -> None:
        self.machine = Machine(ADA, 1, "ada", "1", MachineSettings())
        self.bea, self.beats, self.now_ms = bea, 0, 0
        self.feed(Started(restored or {}))
        self.feed(HardwareProbed(World(Random(1)).add("ada", 8 * 10**9).hardware()))
        self.until(4_500)

    def feed(self, *news: Input) -> list[Effect]:
        return [effect for each in news for effect in self.machine.handle(self.now_ms, each)]

    def until(self, until_ms: int) -> list[Effect]:
        """In steps of 100 ms, in which bea says that she is here."""
        effects: list[Effect] = []
        while self.now_ms < until_ms:
            self.now_ms += 100
            self.beats += 1
            beat = Heartbeat(BEA, 1, self.beats, (ADA,), None, self.machine.cluster.digest)
            effects += self.feed(MessageReceived(beat) if self.bea else DeadlinePassed())
        return effects

    def copied(self, effects: list[Effect]) -> list[Effect]:
        """Bea confirms what she was asked to keep."""
        [update] = updates(effects)
        assert update.keepers == (BEA,)
        return self.feed(MessageReceived(IntentKept(BEA, ADA, update.write)))


def kept(effects: list[Effect]) -> KeepEntries:
    [effect] = [effect for effect in effects if isinstance(effect, KeepEntries)]
    return effect


def updates(effects: list[Effect]) -> list[IntentUpdate]:
    sent = [effect.message for effect in effects if isinstance(effect, Publish)]
    return [message for message in sent if isinstance(message, IntentUpdate)]


def answers(effects: list[Effect]) -> list[CommandOutcome]:
    return [effect.outcome for effect in effects if isinstance(effect, AnswerCommand)]


def test_nothing_is_in_force_before_it_is_on_disk_nor_accepted_before_a_second_disk_has_it() -> None:
    rig = Rig(bea=True)
    effects = rig.feed(PLACE)
    assert list(kept(effects).entries) == ["wish/c", f"instance/c.{ADA[:8]}-1-0"]
    assert not updates(effects)
    assert not rig.machine.cluster.entries
    effects = rig.feed(EntriesKept(kept(effects).token))
    assert rig.machine.cluster.wishes
    assert any(isinstance(effect, StartFetch) for effect in effects)
    assert not answers(effects)
    assert answers(rig.copied(effects)) == [Accepted(InstanceId(f"c.{ADA[:8]}-1-0"))]


def test_where_there_is_no_second_node_the_answer_says_so_at_once() -> None:
    rig = Rig(bea=False)
    effects = rig.feed(EntriesKept(kept(rig.feed(PLACE)).token))
    assert answers(effects) == [Accepted(InstanceId(f"c.{ADA[:8]}-1-0"), on_one_node_only=True)]


def test_a_second_node_that_does_not_confirm_is_asked_again_and_waited_for_only_so_long() -> None:
    """Its disk is full, or hangs."""
    rig = Rig(bea=True)
    effects = rig.feed(EntriesKept(kept(rig.feed(PLACE)).token)) + rig.until(6_400)
    assert not answers(effects)
    assert len({update.write for update in updates(effects)}) == 1
    assert len(updates(effects)) == 4
    assert answers(rig.until(6_500)) == [Accepted(InstanceId(f"c.{ADA[:8]}-1-0"), on_one_node_only=True)]


def test_a_full_disk_refuses_the_command_and_leaves_nothing_behind() -> None:
    rig = Rig(bea=True)
    effects = rig.feed(KeepingFailed(kept(rig.feed(PLACE)).token, "the disk is full"))
    assert answers(effects) == [Refused("the disk is full", 507)]
    assert not rig.machine.cluster.entries
    assert not updates(effects + rig.until(10_000))
    again = rig.feed(CommandSubmitted("d", PlaceModel(card=SMALL)))  # there is room again
    assert answers(rig.copied(rig.feed(EntriesKept(kept(again).token))))


def test_what_is_deleted_by_a_former_id_is_on_a_second_disk_under_that_too() -> None:
    """The simulator's seed 29087: it had been moved just before, and that was on no second disk yet."""
    rig = Rig(bea=True)
    rig.copied(rig.feed(EntriesKept(kept(rig.feed(PLACE)).token)))
    [moved] = rig.machine.cluster.instances
    gone = {f"instance/{moved}": Entry(None, Version(rig.machine.cluster.counter + 1, ADA))}
    rig.feed(EntriesKept(kept(rig.feed(MessageReceived(IntentUpdate(BEA, gone)))).token))
    effects = rig.feed(CommandSubmitted("d", DeleteInstance(moved)))
    [update] = updates(rig.feed(EntriesKept(kept(effects).token)))
    assert update.entries.keys() >= {"wish/c", f"instance/{moved}"}
    assert update.keepers == (BEA,)


def test_commands_wait_for_one_another_in_the_order_they_came() -> None:
    rig = Rig(bea=False)
    first = rig.feed(PLACE, CommandSubmitted("d", PlaceModel(card=SMALL)))
    assert "wish/c" in kept(first).entries
    second = rig.feed(EntriesKept(kept(first).token))
    assert list(kept(second).entries) == ["wish/d", f"instance/d.{ADA[:8]}-1-1"]
    third = rig.feed(EntriesKept(kept(second).token))
    assert [each.effect_id[0] for each in answers(second + third) if isinstance(each, Accepted)] == ["c", "d"]


def test_what_others_wrote_is_confirmed_when_it_is_on_disk() -> None:
    rig = Rig(bea=True)
    update = MessageReceived(IntentUpdate(BEA, DELETED, (1, 3), (ADA,)))
    effects = rig.feed(update)
    confirmation = SendTo(BEA, IntentKept(ADA, BEA, (1, 3)))
    assert confirmation not in effects
    assert kept(effects).entries == DELETED
    assert confirmation in rig.feed(EntriesKept(kept(effects).token))
    assert confirmation in rig.feed(update)  # asked again: it is there


def test_a_full_disk_confirms_nothing_and_is_tried_again_later() -> None:
    rig = Rig(bea=True)
    effects = rig.feed(MessageReceived(IntentUpdate(BEA, DELETED, (1, 3), (ADA,))))
    effects = rig.feed(KeepingFailed(kept(effects).token, "full"), KeepingFailed(99, "stale"))
    assert not [effect for effect in effects if isinstance(effect, SendTo)]
    assert rig.machine.cluster.entries == DELETED  # serving goes on by what is known
    assert not [effect for effect in rig.until(5_400) if isinstance(effect, KeepEntries)]
    second = kept(rig.until(5_500))
    assert second.entries == DELETED
    rig.feed(KeepingFailed(second.token, "full"))
    assert not [effect for effect in rig.until(9_400) if isinstance(effect, KeepEntries)]
    rig.feed(EntriesKept(kept(rig.until(9_600)).token), EntriesKept(second.token))
    assert rig.machine.keeping.unkept == {}


def test_a_full_disk_is_in_the_nodes_report_until_there_is_room() -> None:
    """Else only its own log has it, on a machine that nobody looks at; the answer to the person was "accepted"."""
    rig = Rig(bea=True)
    effects = rig.feed(MessageReceived(IntentUpdate(BEA, DELETED, (1, 3), (ADA,))))
    rig.feed(KeepingFailed(kept(effects).token, "the disk is full"))
    second = kept(rig.until(5_500))
    assert notices(rig) == ("the disk is full",)  # also while it is tried again
    rig.feed(KeepingFailed(second.token, "the disk is full"))
    third = kept(rig.until(9_600))
    assert notices(rig) == ("the disk is full",)
    rig.feed(EntriesKept(third.token))
    rig.until(11_000)
    assert notices(rig) == ()


def test_a_refused_command_leaves_no_notice_since_nothing_waits_for_the_disk() -> None:
    """Whoever asked was told."""
    rig = Rig(bea=True)
    rig.feed(KeepingFailed(kept(rig.feed(PLACE)).token, "the disk is full"))
    rig.until(6_000)
    assert notices(rig) == ()


def notices(rig: Rig) -> tuple[str, ...]:
    report = next(each.report for each in rig.machine.state(rig.now_ms).members if each.node_id == ADA)
    assert report is not None
    return report.notices


def test_an_older_version_that_came_during_a_write_does_not_replace_the_newer_one_on_disk() -> None:
    """The simulator's seed 367: disk and map differed for good."""
    rig = Rig(bea=False)
    first = rig.feed(PLACE)
    older = {"wish/c": Entry(kept(first).entries["wish/c"].value, Version(1, NodeId("0" * 32)))}
    rig.feed(MessageReceived(IntentUpdate(BEA, older)))
    effects = rig.feed(EntriesKept(kept(first).token))
    assert rig.machine.cluster.wishes
    assert not [effect for effect in effects if isinstance(effect, KeepEntries)]


def test_what_was_deleted_elsewhere_during_its_write_is_deleted_on_disk_too() -> None:
    """Another leader had carried the same command out, and somebody had ended it there."""
    rig = Rig(bea=False)
    first = rig.feed(PLACE)
    rig.feed(MessageReceived(IntentUpdate(BEA, {"wish/c": Entry(None, Version(1, NodeId("0" * 32)))})))
    effects = rig.feed(EntriesKept(kept(first).token))
    assert not rig.machine.cluster.wishes
    assert kept(effects).entries == {"wish/c": rig.machine.cluster.entries["wish/c"]}


def test_a_map_that_is_restored_is_not_written_again_but_for_what_is_beyond_the_limit() -> None:
    rig = Rig(bea=False, restored=DELETED)
    assert rig.machine.cluster.entries == DELETED
    assert not [effect for effect in rig.until(10_000) if isinstance(effect, KeepEntries)]
    limit = MachineSettings().tombstones_max
    many = {f"wish/{number:05}": Entry(None, Version(number, ADA)) for number in range(1, limit + 3)}
    machine = Machine(ADA, 1, "ada", "1", MachineSettings())
    assert kept(machine.handle(0, Started(many))).entries == {"wish/00001": None, "wish/00002": None}


def test_old_deletions_are_forgotten_when_a_leader_starts_that_has_known_them_long_enough() -> None:
    deleted = {f"wish/{number}": Entry(None, Version(number, ADA)) for number in range(1, 5)}
    machine = Machine(ADA, 2, "ada", "1", MachineSettings())
    machine.handle(0, Started(deleted, 3))
    machine.handle(0, HardwareProbed(World(Random(1)).add("ada", 8 * 10**9).hardware()))
    effects = [effect for now_ms in range(0, 5_000, 100) for effect in machine.handle(now_ms, DeadlinePassed())]
    assert list(machine.cluster.entries) == ["forgotten", "wish/4"]
    assert {key for key, entry in kept(effects).entries.items() if entry is None} == {"wish/1", "wish/2", "wish/3"}


def test_a_node_that_leaves_ends_the_write_and_answers_it_first() -> None:
    rig = Rig(bea=True)
    first = rig.feed(PLACE)
    effects = rig.feed(CommandSubmitted("d", DeleteInstance(InstanceId("none"))), LeaveRequested())
    assert [each.status for each in answers(effects) if isinstance(each, Refused)] == [503]  # "d", which can't begin
    assert Left() not in effects
    effects = rig.feed(EntriesKept(kept(first).token))
    assert answers(effects) == [Accepted(InstanceId(f"c.{ADA[:8]}-1-0"), on_one_node_only=True)]
    assert effects[-1] == Left()
    assert updates(effects)  # the others know it
