"""A person reads what happened last night: who came and went, what was placed, what failed and why."""

from msgspec.structs import replace

from covey.control.activity import EVENTS_MAX, TEXT_CHARACTERS_MAX, Activity, enumerated
from covey.schema.activity import EventKind
from covey.schema.cluster import (
    Accepted,
    AddKey,
    ApiKey,
    ClusterState,
    Command,
    CommandOutcome,
    DeleteInstance,
    DownloadReport,
    DownloadState,
    PlaceModel,
    Refused,
    RevokeKey,
    TimedOut,
    Visibility,
)
from covey.schema.ids import InstanceId
from covey.schema.runner import RunnerState
from tests.api.fake_backend import CARD, DRAFT, FIRST, SECOND, cluster, member

READY, FAILED = RunnerState.READY, RunnerState.FAILED
KEY = ApiKey(key_id="0" * 12, name="laptop", salt=b"s", digest=b"d", created_s=1)


def told(*states: ClusterState) -> list[str]:
    """What the looks at `states` add to the first one's account."""
    activity = Activity()
    activity.see(0, states[0], ())
    before = len(activity.page(0, EVENTS_MAX).events)
    for number, state in enumerate(states[1:], start=1):
        activity.see(number, state, ())
    return [event.text for event in activity.page(before, EVENTS_MAX).events]


def seen(visibility: Visibility) -> ClusterState:
    first, second = cluster().members
    return replace(cluster(), members=(first, replace(second, visibility=visibility)))


def downloading(state: DownloadState, done: int, reason: str = "") -> ClusterState:
    report = DownloadReport(model_id=CARD.model_id, state=state, bytes_done=done, bytes_total=9, reason=reason)
    return replace(cluster(), members=(member(FIRST, "anna", (), downloads=(report,)),))


def test_the_first_look_is_where_the_account_begins() -> None:
    activity = Activity()
    activity.see(5, cluster(READY, READY), (KEY,))
    assert [event.text for event in activity.page(0, 99).events] == [
        "anna joined.",
        "berta joined.",
        "anna leads the cluster.",
        "Tiny-Chat is placed on anna and berta as inst-1.",
        "Tiny-Chat is ready as inst-1.",
    ]
    assert {event.at_ms for event in activity.page(0, 99).events} == {5}


def test_names_are_told_as_in_a_sentence() -> None:
    assert [enumerated(["attic", "second", "third"][:count]) for count in (1, 2, 3)] == [
        "attic",
        "attic and second",
        "attic, second and third",
    ]


def test_a_node_comes_goes_away_returns_and_leaves() -> None:
    alone = replace(cluster(), members=cluster().members[:1])
    silent = replace(cluster(), members=(cluster().members[0], replace(cluster().members[1], report=None)))
    away, back = seen(Visibility.AWAY), seen(Visibility.VISIBLE)
    assert told(alone, silent, back, away, back, away, alone) == [
        "berta joined.",
        "berta is away: it is not heard any more.",
        "berta is back.",
        "berta is away: it is not heard any more.",
        "berta has been away for too long and is not counted any more.",
    ]


def test_a_node_that_says_its_name_before_it_is_visible_has_not_been_away() -> None:
    alone = replace(cluster(), members=cluster().members[:1])
    away, here = seen(Visibility.AWAY), seen(Visibility.VISIBLE)
    assert told(alone, away, here, away, here) == [
        "berta joined.",
        "berta is away: it is not heard any more.",
        "berta is back.",
    ]


def test_a_node_that_leaves_in_order_has_not_been_away() -> None:
    alone = replace(cluster(), members=cluster().members[:1])
    assert told(cluster(), alone) == ["berta has left."]


def test_the_leader_changes() -> None:
    other, nobody = replace(cluster(), leader=SECOND), replace(cluster(), leader=None)
    assert told(cluster(), nobody, other) == ["Nobody leads the cluster.", "berta leads the cluster."]


def test_how_an_instance_is_placed_stands_between_commas() -> None:
    plain = cluster(READY, READY).instances[0]
    ways = [{"draft": DRAFT}, {"rank_count": 2}, {"rank_count": 2, "draft": DRAFT}]
    texts = [told(cluster(), replace(cluster(FAILED, FAILED), instances=(replace(plain, **way),)))[0] for way in ways]
    assert [text.removeprefix("Tiny-Chat is placed on anna and berta") for text in texts] == [
        ", with Tiny-Draft as its draft, as inst-1.",
        ", each layer shared by 2 of them, as inst-1.",
        ", each layer shared by 2 of them, with Tiny-Draft as its draft, as inst-1.",
    ]


def test_an_instance_is_placed_fails_recovers_and_is_removed() -> None:
    failed = cluster(READY, FAILED, reason="It ran out of memory\nlast line of the log\n")
    starting = cluster(READY, RunnerState.LOADING)
    assert told(cluster(), starting, failed, failed, starting, failed, cluster(READY, READY), cluster()) == [
        "Tiny-Chat is placed on anna and berta as inst-1.",
        "The part of Tiny-Chat on berta failed: It ran out of memory.",
        "Tiny-Chat is ready as inst-1.",
        "Tiny-Chat is not placed as inst-1 any more.",
    ]


def test_a_runner_that_is_started_again_at_once_has_failed_too() -> None:
    """What was well is tried again within the same moment, so that no look sees it fail."""
    ready, again = (
        cluster(READY, READY),
        cluster(READY, RunnerState.IDLE, reason="the runner ended: signal 9 (SIGKILL)"),
    )
    assert told(ready, again_in(2, again, layers_loaded=0), ready) == [
        "The part of Tiny-Chat on berta failed: the runner ended: signal 9 (SIGKILL).",
        "Tiny-Chat is ready as inst-1.",
    ]
    assert told(ready, again_in(2, again, layers_loaded=3), ready) == ["Tiny-Chat is ready as inst-1."]
    parted = cluster(READY, RunnerState.PARTED, reason="The link to stage 0 is lost.")  # before it had loaded anything
    before, after = again_in(1, parted, layers_loaded=0), again_in(2, parted, layers_loaded=0)
    assert told(before, after, ready) == ["Tiny-Chat is ready as inst-1."]


def again_in(attempt: int, state: ClusterState, layers_loaded: int) -> ClusterState:
    """With berta's runner in this attempt."""
    anna, berta = state.members
    assert berta.report is not None
    [report] = berta.report.runners
    runners = (replace(report, attempt=attempt, layers_loaded=layers_loaded),)
    return replace(state, members=(anna, replace(berta, report=replace(berta.report, runners=runners))))


def test_a_runner_that_nobody_needs_any_more_does_not_fail() -> None:
    """Its instance was removed or assigned anew, and its links were closed: nothing is wrong."""
    failed = replace(cluster(READY, FAILED, reason="The link to stage 0 is lost"), instances=())
    assert told(replace(cluster(READY, READY), instances=()), failed) == []


def test_what_was_there_before_a_node_came_is_no_news() -> None:
    """A node that joins, or starts again, is told at once what failed and what is fetched since yesterday."""
    fetching = downloading(DownloadState.ONGOING, 5).members[0].report
    assert fetching is not None
    there = cluster(READY, FAILED, reason="It broke yesterday.")
    anna, berta = there.members
    assert berta.report is not None
    berta = replace(berta, report=replace(berta.report, downloads=fetching.downloads))
    assert told(replace(there, members=(anna,)), replace(there, members=(anna, berta))) == ["berta joined."]


def test_a_process_that_does_not_end_is_told_once() -> None:
    failed, ended = cluster(READY, FAILED, reason="It hung"), cluster(READY, RunnerState.STUCK)
    anna, berta = ended.members
    assert berta.report is not None
    runners = tuple(replace(each, waiting="can't end process 7") for each in berta.report.runners)
    stuck = replace(ended, members=(anna, replace(berta, report=replace(berta.report, runners=runners))))
    assert told(cluster(READY, RunnerState.LOADING), failed, stuck, stuck, failed) == [
        "The part of Tiny-Chat on berta failed: It hung.",
        "berta can't end process 7.",
    ]


def test_a_download_begins_fails_and_ends() -> None:
    begun, more = downloading(DownloadState.ONGOING, 1), downloading(DownloadState.ONGOING, 5)
    failed = downloading(DownloadState.FAILED, 5, "the disk is full")
    done = downloading(DownloadState.COMPLETED, 9)
    assert told(downloading(DownloadState.ONGOING, 0), begun, more, failed, more, failed, more, done) == [
        "anna began to download Tiny-Chat.",
        "anna could not download Tiny-Chat: the disk is full.",
        "anna has downloaded Tiny-Chat.",
    ]
    again = downloading(DownloadState.ONGOING, 5, "no network")
    assert told(more, again, again, more, done) == [
        "anna could not download Tiny-Chat: no network.",
        "anna has downloaded Tiny-Chat.",
    ]


def test_a_file_that_was_there_already_is_no_download() -> None:
    assert told(cluster(), downloading(DownloadState.ONGOING, 0), downloading(DownloadState.COMPLETED, 9)) == [
        "berta has left."  # the other look has one node only
    ]


def test_commands_that_were_not_carried_out() -> None:
    activity = Activity()
    cases: list[tuple[Command, CommandOutcome]] = [
        (PlaceModel(card=CARD), Accepted("inst-1")),
        (PlaceModel(card=CARD), Refused("No node has 9 GB free.", 409)),
        (DeleteInstance(InstanceId("inst-1")), TimedOut(10_000)),
        (AddKey(KEY), Refused("there is one", 409)),
        (RevokeKey("phone"), Refused("there is none", 404)),
    ]
    for command, outcome in cases:
        activity.hear(0, command, outcome)
    assert [(event.kind, event.text) for event in activity.page(0, 99).events] == [
        (EventKind.COMMAND_REFUSED, "Placing Tiny-Chat was refused: No node has 9 GB free."),
        (EventKind.COMMAND_TIMED_OUT, "Removing inst-1 was not answered by a leader within 10 s."),
        (EventKind.COMMAND_REFUSED, "Adding the API key 'laptop' was refused: there is one."),
        (EventKind.COMMAND_REFUSED, "Revoking the API key 'phone' was refused: there is none."),
    ]


def test_keys_are_told_by_name_and_never_shown() -> None:
    activity = Activity()
    for keys in ((), (KEY,), ()):
        activity.see(0, replace(cluster(), members=(), leader=None), keys)
    assert [event.text for event in activity.page(0, 9).events] == [
        "The API key 'laptop' (000000000000) was added.",
        "The API key 'laptop' (000000000000) was revoked.",
    ]


def test_the_ring_is_bounded_and_so_is_each_sentence() -> None:
    activity = Activity(events_max=10)
    for number in range(25):
        activity.hear(number, RevokeKey(f"{number}"), Refused("x" * 5000))
    page = activity.page(0, 99)
    assert (page.first_number, [event.number for event in page.events]) == (16, list(range(16, 26)))
    assert {len(event.text) for event in page.events} == {TEXT_CHARACTERS_MAX}
    assert [event.number for event in activity.page(20, 2).events] == [21, 22]
    assert activity.page(25, 2).events == ()
