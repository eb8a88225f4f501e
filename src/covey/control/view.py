"""The cluster as this node sees it: what was heard of the others, laid over what was asked for."""

from collections.abc import Sequence

from covey.control.cluster import Cluster
from covey.control.dormancy import active, assigned_nodes
from covey.control.membership import Membership
from covey.control.placement.nodes import Candidate
from covey.control.reports import Reporter
from covey.control.routing import candidates, have_parted, runner_report
from covey.control.settings import MachineSettings
from covey.schema.cluster import Instance, NodeReport
from covey.schema.ids import InstanceId, NodeId


class View:
    """Questions only; it changes nothing. `listening_since_ms` is when this node started, or last woke up."""

    def __init__(self, settings: MachineSettings, membership: Membership, cluster: Cluster, reporter: Reporter) -> None:
        self.settings = settings
        self.membership = membership
        self.cluster = cluster
        self.reporter = reporter
        self.listening_since_ms = 0

    def reports(self) -> dict[NodeId, NodeReport]:
        """What everybody who is not forgotten says, this node too."""
        others = {peer.node_id: peer.report for peer in self.membership.peers.values() if peer.report}
        own = self.reporter.last
        return {**others, self.reporter.node_id: own} if own else others

    @property
    def listened_ms(self) -> int:
        """When we have listened for so long that who was not heard is gone."""
        return self.listening_since_ms + self.settings.forgotten_ms

    def gone(self, now_ms: int) -> list[NodeId]:
        """Nodes with assignments that are lost, forgotten, or were never heard though we have listened long enough."""
        listened = now_ms >= self.listened_ms
        peers = self.membership.peers
        return [
            node_id
            for node_id in assigned_nodes(self.cluster.instances.values())
            if node_id != self.reporter.node_id
            and (peers[node_id].is_lost if node_id in peers else listened or node_id in self.membership.seen)
        ]

    def broken_off(self, now_ms: int) -> set[NodeId]:
        """Nodes that are away while a runner that worked with one of theirs, here or on a visible node, has failed."""
        reports, hears = self.reports(), (self.reporter.node_id, *self.membership.hears(now_ms))
        heard = {node_id: report for node_id, report in reports.items() if node_id in hears}
        return {
            stage.node_id
            for instance in self.cluster.instances.values()
            for stage in instance.stages
            if stage.node_id in self.membership.peers and stage.node_id not in hears
            if have_parted(instance.stages, runner_report(stage, reports), heard)
        }

    def active(self, now_ms: int) -> dict[InstanceId, Instance]:
        """The instances that count here and now."""
        return active(self.cluster.instances, self.gone(now_ms), self.reports())

    def assigned(self, now_ms: int) -> list[Instance]:
        """Of those, the ones that this node has a part of."""
        node_id = self.reporter.node_id
        return [each for each in self.active(now_ms).values() if node_id in {stage.node_id for stage in each.stages}]

    def is_learning(self, now_ms: int) -> bool:
        """Whether a node that came lately, or this one, has still to tell its memory, or to hear the others."""
        limit = self.settings.hardware_wait_ms
        waited = [(self.listening_since_ms, self.reporter.last)]
        waited += [(peer.first_heard_ms, peer.report) for peer in self.membership.visible(now_ms)]
        if any(now_ms - since < limit and not (report and report.hardware) for since, report in waited):
            return True
        company = {peer.node_id for peer in self.membership.company(now_ms)}
        return any(
            now_ms - peer.first_heard_ms < limit and peer.node_id not in company
            for peer in self.membership.peers.values()
        )

    def candidates(self, now_ms: int, leaving: Sequence[Instance]) -> tuple[Candidate, ...]:
        """The nodes that a placement may use now. `leaving`: instances that end if it is made."""
        staying = [each for each in self.active(now_ms).values() if each not in leaving]
        company = [self.reporter.node_id, *(peer.node_id for peer in self.membership.company(now_ms))]
        reports = self.reports()
        here = [report for node_id, report in reports.items() if node_id in company]
        away = [report for node_id, report in reports.items() if node_id not in company]
        return candidates(here, away, staying, leaving)
