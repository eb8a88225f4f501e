"""Who is here, by heartbeats that say whom their sender hears.

A node is visible while it was heard lately and hears us. It is away after `away_ms`, lost after `lost_ms`, or sooner if
more speaks for it (its work is given to others then), and forgotten, with its report, `forgotten_ms` after it was last
heard. A node that says that it leaves is forgotten at once. (boot, sequence) is
remembered even then: what was sent before what we have seen can't bring a node back, and of a boot that left nothing
counts any more. Heartbeats and reports are counted together, and only the latest of both shows that its sender lives;
what one of them says counts until a later one of its own kind comes.
"""

from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from covey.control.settings import NODES_REMEMBERED_MAX, MachineSettings
from covey.schema.cluster import Claim, Heartbeat, Member, NodeReport, Visibility
from covey.schema.ids import NodeId

Moment = tuple[int, int]  # (boot, sequence)
NEVER: Moment = (-1, -1)
LAST_SEQUENCE: Final = 2**63 - 1  # of a boot: later than all that it can have said


class Peer(Struct):
    """One other node, from when it was first heard until it is forgotten."""

    node_id: NodeId
    boot: int
    first_heard_ms: int
    heard_ms: int  # last heard
    forget_ms: int  # when it is forgotten, unless heard again
    heartbeat_moment: Moment  # of the last heartbeat; at first of what was seen before it was forgotten
    report_moment: Moment  # the same for reports
    hears: tuple[NodeId, ...] = ()
    claim: Claim | None = None
    intent_digest: str | None = None
    report: NodeReport | None = None
    shown: Visibility = Visibility.AWAY  # as last announced
    is_lost: bool = False


class Membership:
    """The other nodes. `revision` grows when a client could see a difference."""

    def __init__(self, node_id: NodeId, settings: MachineSettings) -> None:
        self.node_id = node_id
        self.settings = settings
        self.peers: dict[NodeId, Peer] = {}
        self.seen: dict[NodeId, Moment] = {}  # the latest of every node ever heard, forgotten ones too
        self.revision = 0

    # ---- what comes in ----

    def hear_heartbeat(self, now_ms: int, heartbeat: Heartbeat) -> bool:
        """Takes it in, unless it is stale or says goodbye.

        True if its sender is new here, started anew, or was away: greet it.
        """
        moment = (heartbeat.boot, heartbeat.sequence)
        peer = self.peers.get(heartbeat.node_id)
        if moment <= (peer.heartbeat_moment if peer else self.seen.get(heartbeat.node_id, NEVER)):
            return False
        if peer and heartbeat.boot < peer.boot:
            return False
        if heartbeat.is_leaving:
            self._let_go(heartbeat)
            return False
        peer, arrived = self._hear(now_ms, heartbeat.node_id, moment)
        peer.heartbeat_moment = moment
        peer.hears, peer.claim, peer.intent_digest = heartbeat.hears, heartbeat.claim, heartbeat.intent_digest
        self._show(now_ms, peer)
        return arrived

    def hear_report(self, now_ms: int, report: NodeReport) -> bool:
        """Takes it in, unless it is stale. True as of a heartbeat: whichever comes first brings the sender back."""
        moment = (report.boot, report.sequence)
        peer = self.peers.get(report.node_id)
        if peer is None:
            if moment <= self.seen.get(report.node_id, NEVER):
                return False
        elif report.boot < peer.boot or moment <= peer.report_moment:
            return False
        peer, arrived = self._hear(now_ms, report.node_id, moment)
        says_more = peer.report is None or replace(report, sequence=peer.report.sequence) != peer.report
        peer.report, peer.report_moment = report, moment
        self.revision += says_more
        return arrived

    def _hear(self, now_ms: int, node_id: NodeId, moment: Moment) -> tuple[Peer, bool]:
        """The sender's record; True if it was not among those that we hear, and is now."""
        peer, before = self.peers.get(node_id), self.seen.get(node_id, NEVER)
        is_latest = moment > before  # else it was under way for longer than what its sender said after it
        arrived = is_latest and (peer is None or moment[0] > peer.boot or not self._hears(now_ms, peer))
        if peer is None:
            peer = Peer(node_id, moment[0], now_ms, now_ms, 0, before, before)
            self.peers[node_id] = peer
            self.peers = dict(sorted(self.peers.items()))
            self.revision += 1
        elif moment[0] > peer.boot:  # its runners and its claim ended with its last life
            peer.boot, peer.report, peer.claim, peer.first_heard_ms = moment[0], None, None, now_ms
            peer.hears = ()
            self.revision += 1
        if is_latest:
            peer.heard_ms, peer.forget_ms = now_ms, now_ms + self.settings.forgotten_ms
            peer.is_lost = False
            self._remember(node_id, moment)
        return peer, arrived

    def _let_go(self, heartbeat: Heartbeat) -> None:
        self.revision += self.peers.pop(heartbeat.node_id, None) is not None
        self._remember(heartbeat.node_id, (heartbeat.boot, LAST_SEQUENCE))

    def _remember(self, node_id: NodeId, moment: Moment) -> None:
        latest = max(moment, self.seen.pop(node_id, NEVER))
        self.seen[node_id] = latest
        excess = len(self.seen) - NODES_REMEMBERED_MAX
        if excess > 0:  # of peers nothing is forgotten, however many they are
            for known in [known for known in self.seen if known not in self.peers][:excess]:
                del self.seen[known]

    # ---- time ----

    def advance(self, now_ms: int) -> None:
        """Lets nodes be away, lost or forgotten as time passes."""
        for peer in list(self.peers.values()):
            if now_ms >= peer.forget_ms:
                del self.peers[peer.node_id]
                self.revision += 1
            else:
                peer.is_lost |= now_ms >= self._lost_ms(peer)
                self._show(now_ms, peer)

    def lose(self, now_ms: int, node_id: NodeId) -> None:
        """More than silence says that it is gone. Of a node that we hear that means nothing."""
        peer = self.peers.get(node_id)
        if peer and not self._hears(now_ms, peer):
            peer.is_lost = True

    def wake(self, now_ms: int) -> None:
        """We slept and heard nothing meanwhile: everybody is away at first, and has the whole time to be heard."""
        for peer in self.peers.values():
            peer.heard_ms = min(peer.heard_ms, now_ms - self.settings.away_ms)
            peer.forget_ms = now_ms + self.settings.forgotten_ms

    def deadline(self) -> int | None:
        """When `advance` next has something to do."""
        return min((self._next_ms(peer) for peer in self.peers.values()), default=None)

    def _next_ms(self, peer: Peer) -> int:
        if peer.shown is Visibility.VISIBLE:
            return peer.heard_ms + self.settings.away_ms
        return peer.forget_ms if peer.is_lost else self._lost_ms(peer)

    def _lost_ms(self, peer: Peer) -> int:
        return peer.forget_ms - self.settings.forgotten_ms + self.settings.lost_ms

    def _show(self, now_ms: int, peer: Peer) -> None:
        shown = Visibility.VISIBLE if self.is_visible(now_ms, peer.node_id) else Visibility.AWAY
        if shown is not peer.shown:
            peer.shown = shown
            self.revision += 1

    def _hears(self, now_ms: int, peer: Peer) -> bool:
        return now_ms - peer.heard_ms < self.settings.away_ms

    # ---- questions ----

    def hears(self, now_ms: int) -> tuple[NodeId, ...]:
        """The nodes that we have heard lately, for our own heartbeat."""
        return tuple(peer.node_id for peer in self.peers.values() if self._hears(now_ms, peer))

    def is_visible(self, now_ms: int, node_id: NodeId) -> bool:
        """Heard lately, in both directions. This node is always visible to itself."""
        if node_id == self.node_id:
            return True
        peer = self.peers.get(node_id)
        return peer is not None and self._hears(now_ms, peer) and self.node_id in peer.hears

    def visible(self, now_ms: int) -> list[Peer]:
        """The visible peers, by id."""
        return [peer for peer in self.peers.values() if self.is_visible(now_ms, peer.node_id)]

    def company(self, now_ms: int) -> list[Peer]:
        """Visible peers that all see one another too: a pipeline may cross any of them. Who was heard first comes
        first: of somebody new the others' heartbeats may not tell yet.
        """
        company: list[Peer] = []
        for peer in sorted(self.visible(now_ms), key=lambda peer: (peer.first_heard_ms, peer.node_id)):
            if all(peer.node_id in other.hears and other.node_id in peer.hears for other in company):
                company.append(peer)
        return company

    def members(self, now_ms: int, own_report: NodeReport | None) -> tuple[Member, ...]:
        """Everybody who is not forgotten, this node too, by id."""
        others = [
            Member(node_id=peer.node_id, visibility=peer.shown, heard_ms_ago=now_ms - peer.heard_ms, report=peer.report)
            for peer in self.peers.values()
        ]
        own = Member(node_id=self.node_id, visibility=Visibility.VISIBLE, heard_ms_ago=0, report=own_report)
        return tuple(sorted([own, *others], key=lambda member: member.node_id))
