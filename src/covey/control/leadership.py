"""Who leads: the highest visible claim; with none for a while, the lowest visible id claims the highest term seen +
1.

There is no quorum, on purpose: two laptops must survive the loss of one. A claim is what a node's own heartbeats say
of itself, so it ends with its node, and a leader that sees a higher claim gives its own up.
"""

from covey.control.membership import Membership
from covey.control.settings import COUNTER_LEAP_MAX, MachineSettings
from covey.schema.cluster import Claim
from covey.schema.ids import NodeId


class Leadership:
    """The claim of this node, and whom it follows. `revision` grows when the leader changes."""

    def __init__(self, node_id: NodeId, settings: MachineSettings, membership: Membership) -> None:
        self.node_id = node_id
        self.settings = settings
        self.membership = membership
        self.claim: Claim | None = None  # our own
        self.leader: NodeId | None = None
        self.led_since_ms = 0  # by us
        self.term_seen = 0
        self.leaderless_since_ms: int | None = None
        self.revision = 0

    def advance(self, now_ms: int) -> None:
        """Follows, claims or gives up, as what is visible now demands."""
        self.term_seen = max([self.term_seen, *(claim.term for claim in self._claimants(now_ms))])
        highest = self._highest_claim(now_ms)
        if highest is None:
            highest = self._claim_if_due(now_ms)
        elif highest != self.claim:
            self.claim = None
        self._follow(now_ms, highest)

    def resign(self, now_ms: int) -> None:
        """Gives an own claim up: this node leaves, or slept and can't know what happened meanwhile."""
        self.claim = None
        self.leaderless_since_ms = now_ms
        self._follow(now_ms, None)

    def hear_goodbye(self, now_ms: int, node_id: NodeId) -> None:
        """A leader that says that it leaves is not waited for."""
        if node_id == self.leader:
            self.leaderless_since_ms = now_ms - self.settings.leaderless_ms
            self._follow(now_ms, None)

    def deadline(self) -> int | None:
        """When this node may have to claim."""
        since = self.leaderless_since_ms
        return None if since is None else since + self.settings.leaderless_ms

    @property
    def leads(self) -> bool:
        return self.leader == self.node_id

    def _claimants(self, now_ms: int) -> list[Claim]:
        highest = self.term_seen + COUNTER_LEAP_MAX
        claims = [peer.claim for peer in self.membership.visible(now_ms)]
        return [claim for claim in claims if claim and claim.term <= highest]

    def _highest_claim(self, now_ms: int) -> Claim | None:
        claims = self._claimants(now_ms) + ([self.claim] if self.claim else [])
        return min(claims, key=lambda claim: (-claim.term, claim.node_id), default=None)

    def _claim_if_due(self, now_ms: int) -> Claim | None:
        deadline = self.deadline()
        if deadline is None or now_ms < deadline:
            return None
        if any(peer.node_id < self.node_id for peer in self.membership.visible(now_ms)):
            return None  # a lower id is here: it claims at about this time
        self.term_seen += 1
        self.claim = Claim(self.term_seen, self.node_id)
        return self.claim

    def _follow(self, now_ms: int, claim: Claim | None) -> None:
        if claim:
            self.leaderless_since_ms = None
        elif self.leaderless_since_ms is None:
            self.leaderless_since_ms = now_ms
        leader = claim.node_id if claim else None
        if leader != self.leader:
            self.leader = leader
            self.led_since_ms = now_ms
            self.revision += 1
