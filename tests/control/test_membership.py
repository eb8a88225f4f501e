"""Who is visible, away and forgotten; what is stale stays stale."""

from msgspec.structs import replace

from covey.control.leadership import Leadership
from covey.control.membership import Membership
from covey.control.settings import NODES_REMEMBERED_MAX, MachineSettings
from covey.schema.cluster import Claim, Heartbeat, NodeReport, Visibility
from covey.schema.ids import NodeId

SETTINGS = MachineSettings()
ME, ADA, BEA = NodeId("m"), NodeId("a"), NodeId("b")


def beat(
    node_id: NodeId, sequence: int, boot: int = 1, hears: tuple[NodeId, ...] = (ME,), claim: Claim | None = None
) -> Heartbeat:
    return Heartbeat(node_id, boot, sequence, hears, claim, "")


def report(node_id: NodeId, sequence: int, boot: int = 1) -> NodeReport:
    return NodeReport(
        node_id=node_id,
        boot=boot,
        sequence=sequence,
        name="name",
        version="1",
        api_address=None,
        hardware=None,
        downloads=(),
        runners=(),
    )


def hear(members: Membership, now_ms: int, message: Heartbeat | NodeReport) -> bool:
    if isinstance(message, Heartbeat):
        return members.hear_heartbeat(now_ms, message)
    return members.hear_report(now_ms, message)


def shown(members: Membership, node_id: NodeId = ADA) -> Visibility | None:
    return members.peers[node_id].shown if node_id in members.peers else None


def test_a_killed_node_is_away_in_under_three_seconds() -> None:
    """Its last heartbeat left just before it was killed and took 400 ms on a busy machine."""
    members = Membership(ME, SETTINGS)
    members.hear_heartbeat(400, beat(ADA, 1))
    assert shown(members) is Visibility.VISIBLE
    deadline = members.deadline()
    assert deadline is not None
    assert deadline < 3_000
    members.advance(deadline)
    assert shown(members) is Visibility.AWAY


def test_four_lost_heartbeats_in_a_row_are_survived() -> None:
    members = Membership(ME, SETTINGS)
    members.hear_heartbeat(0, beat(ADA, 1))
    members.advance(5 * SETTINGS.heartbeat_ms - 1)
    assert shown(members) is Visibility.VISIBLE


def test_who_does_not_hear_us_is_not_visible() -> None:
    members = Membership(ME, SETTINGS)
    members.hear_heartbeat(0, beat(ADA, 1, hears=(BEA,)))
    assert shown(members) is Visibility.AWAY
    assert members.hears(0) == (ADA,)


def test_forgotten_thirty_seconds_after_it_was_last_heard() -> None:
    members = Membership(ME, SETTINGS)
    members.hear_heartbeat(0, beat(ADA, 1))
    members.advance(29_999)
    assert shown(members) is Visibility.AWAY
    members.advance(30_000)
    assert shown(members) is None


def test_what_was_sent_before_it_was_forgotten_does_not_bring_a_node_back() -> None:
    members = Membership(ME, SETTINGS)
    members.hear_heartbeat(0, beat(ADA, 5))
    members.advance(30_000)
    members.hear_heartbeat(30_001, beat(ADA, 4))
    members.hear_heartbeat(30_001, beat(ADA, 5))
    members.hear_report(30_001, report(ADA, 3))
    assert ADA not in members.peers
    members.hear_report(30_002, report(ADA, 6))
    assert ADA in members.peers
    members.hear_heartbeat(30_003, beat(ADA, 5))
    assert shown(members) is Visibility.AWAY  # that heartbeat was older than what it came back with


def test_a_delayed_message_of_either_kind_does_not_bring_a_dead_node_back() -> None:
    """Heartbeats and reports are counted together: what was sent before the last of both shows no life."""
    for last, late in ((beat(ADA, 10), report(ADA, 9)), (report(ADA, 10), beat(ADA, 9))):
        members = Membership(ME, SETTINGS)
        hear(members, 0, beat(ADA, 8, claim=Claim(3, ADA)))
        hear(members, 100, last)
        members.advance(6_000)
        assert shown(members) is Visibility.AWAY
        assert not hear(members, 6_000, late)  # nobody to greet
        members.advance(6_000)
        assert shown(members) is Visibility.AWAY
        assert members.hears(6_000) == ()
        members.advance(30_100)
        assert shown(members) is None


def test_what_was_overtaken_by_the_other_kind_is_news_all_the_same() -> None:
    """A newcomer is greeted with a heartbeat and the last report, which is older than that."""
    members = Membership(ME, SETTINGS)
    hear(members, 0, beat(ADA, 10))
    hear(members, 100, report(ADA, 9))
    assert members.peers[ADA].report == report(ADA, 9)
    hear(members, 200, report(ADA, 12))
    hear(members, 200, beat(ADA, 11, claim=Claim(3, ADA)))
    assert members.peers[ADA].claim == Claim(3, ADA)


def test_a_new_life_of_a_node_drops_what_the_old_one_said() -> None:
    members = Membership(ME, SETTINGS)
    members.hear_heartbeat(0, beat(ADA, 90))
    members.hear_report(0, report(ADA, 91))
    assert members.hear_heartbeat(10, beat(ADA, 1, boot=2))
    assert members.peers[ADA].report is None
    members.hear_report(20, report(ADA, 92, boot=1))
    assert members.peers[ADA].report is None
    members.hear_report(20, report(ADA, 2, boot=2))
    assert members.peers[ADA].report is not None


def test_who_says_goodbye_is_gone_at_once_and_only_a_new_life_comes_back() -> None:
    members = Membership(ME, SETTINGS)
    members.hear_heartbeat(0, beat(ADA, 5))
    assert not members.hear_heartbeat(100, replace(beat(ADA, 8), is_leaving=True))
    assert ADA not in members.peers
    members.hear_heartbeat(110, beat(ADA, 7))
    members.hear_heartbeat(110, replace(beat(ADA, 9), is_leaving=True))
    members.hear_report(110, report(ADA, 6))
    members.hear_report(110, report(ADA, 10))  # of a runner that has ended since
    assert ADA not in members.peers
    assert members.hear_heartbeat(200, beat(ADA, 1, boot=2))
    members.hear_heartbeat(210, replace(beat(ADA, 11), is_leaving=True))  # of the life before, late
    assert shown(members) is Visibility.VISIBLE


def test_any_number_of_living_nodes_is_heard_and_of_the_forgotten_the_latest_are_remembered() -> None:
    members = Membership(ME, SETTINGS)
    everybody = [NodeId(f"{number:04}") for number in range(NODES_REMEMBERED_MAX + 2)]
    for node_id in everybody:
        members.hear_heartbeat(0, beat(node_id, 1))
    assert len(members.peers) == len(members.seen) == NODES_REMEMBERED_MAX + 2
    members.hear_heartbeat(29_000, beat(everybody[0], 2))
    members.advance(30_000)
    members.hear_heartbeat(30_000, beat(everybody[0], 3))
    assert list(members.seen) == [*everybody[3:], everybody[0]]


def test_reports_may_overtake_one_another() -> None:
    members = Membership(ME, SETTINGS)
    members.hear_report(0, report(ADA, 3))
    members.hear_report(1, report(ADA, 2))
    assert members.peers[ADA].report == report(ADA, 3)


def test_after_a_sleep_nobody_is_fresh_but_nobody_is_forgotten_either() -> None:
    members = Membership(ME, SETTINGS)
    members.hear_heartbeat(0, beat(ADA, 1))
    members.wake(3_600_000)
    members.advance(3_600_000)
    assert shown(members) is Visibility.AWAY
    members.hear_heartbeat(3_600_100, beat(ADA, 2))
    assert shown(members) is Visibility.VISIBLE


def test_company_is_nodes_that_all_see_one_another() -> None:
    members = Membership(ME, SETTINGS)
    members.hear_heartbeat(0, beat(ADA, 1, hears=(ME,)))
    members.hear_heartbeat(0, beat(BEA, 1, hears=(ME, ADA)))
    assert [peer.node_id for peer in members.company(0)] == [ADA]
    members.hear_heartbeat(1, beat(ADA, 2, hears=(ME, BEA)))
    assert [peer.node_id for peer in members.company(1)] == [ADA, BEA]


def test_a_newcomer_pushes_nobody_out_of_the_company() -> None:
    """It is heard by all and hears them, but their next heartbeats, which say so, are still to come."""
    members = Membership(ME, SETTINGS)
    members.hear_heartbeat(0, beat(BEA, 1, hears=(ME,)))
    members.hear_heartbeat(5_000, beat(BEA, 11, hears=(ME,)))
    members.hear_heartbeat(5_001, beat(ADA, 1, hears=(ME, BEA)))
    assert [peer.node_id for peer in members.company(5_001)] == [BEA]


# ---- who leads ----


def test_a_lone_node_leads_after_a_second() -> None:
    leadership = Leadership(ME, SETTINGS, Membership(ME, SETTINGS))
    leadership.advance(0)
    leadership.advance(999)
    assert leadership.leader is None
    leadership.advance(1_000)
    assert leadership.claim == Claim(1, ME)


def test_with_a_lower_id_in_sight_a_node_does_not_claim() -> None:
    members = Membership(ME, SETTINGS)
    leadership = Leadership(ME, SETTINGS, members)
    members.hear_heartbeat(0, beat(ADA, 1))
    leadership.advance(0)
    leadership.advance(2_000)
    assert leadership.claim is None


def test_the_higher_term_wins_and_within_one_the_lower_id() -> None:
    members = Membership(ME, SETTINGS)
    leadership = Leadership(ME, SETTINGS, members)
    leadership.advance(0)
    leadership.advance(1_000)
    members.hear_heartbeat(1_100, beat(BEA, 1, claim=Claim(1, BEA)))
    leadership.advance(1_100)
    assert leadership.leader == BEA
    assert leadership.claim is None
    members.hear_heartbeat(1_200, beat(ADA, 1, claim=Claim(3, ADA)))
    leadership.advance(1_200)
    assert leadership.leader == ADA


def test_the_next_claim_is_higher_than_any_term_seen() -> None:
    members = Membership(ME, SETTINGS)
    leadership = Leadership(ME, SETTINGS, members)
    members.hear_heartbeat(0, beat(ADA, 1, claim=Claim(41, ADA)))
    leadership.advance(0)
    members.advance(2_500)
    leadership.advance(2_500)
    assert leadership.leader is None
    leadership.advance(3_500)
    assert leadership.claim == Claim(42, ME)


def test_a_leader_that_says_goodbye_is_followed_at_once() -> None:
    members = Membership(ME, SETTINGS)
    leadership = Leadership(ME, SETTINGS, members)
    members.hear_heartbeat(0, beat(ADA, 1, claim=Claim(4, ADA)))
    leadership.advance(0)
    members.hear_heartbeat(100, replace(beat(ADA, 2), is_leaving=True))
    leadership.hear_goodbye(100, ADA)
    leadership.advance(100)
    assert leadership.claim == Claim(5, ME)


def test_a_claim_from_the_future_is_not_followed() -> None:
    members = Membership(ME, SETTINGS)
    leadership = Leadership(ME, SETTINGS, members)
    members.hear_heartbeat(0, beat(ADA, 1, claim=Claim(2**63, ADA)))
    members.hear_heartbeat(0, beat(BEA, 1, claim=Claim(7, BEA)))
    leadership.advance(0)
    assert leadership.leader == BEA
    assert leadership.term_seen == 7
