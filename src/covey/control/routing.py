"""Which instance serves a request, and how far an instance has come: read from a snapshot, in the same words
everywhere.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

from msgspec import Struct
from msgspec.structs import replace

from covey.control.addresses import ways_to
from covey.control.cluster import options_of
from covey.control.placement.again import place_at_all
from covey.control.placement.memory import still_to_take_bytes
from covey.control.placement.nodes import Candidate
from covey.control.runner_table import LINKING_STATES, MEASURED_STATES, SERVING_STATES, STARTED_STATES, has_given_up
from covey.schema.cluster import (
    ClusterState,
    DownloadReport,
    DownloadState,
    Hardware,
    Instance,
    InstancePhase,
    InstanceStatus,
    NodeReport,
    Refused,
    RunnerReport,
    Stage,
    Visibility,
    Wish,
)
from covey.schema.ids import ModelId, NodeId
from covey.schema.pipeline import cards_at
from covey.schema.runner import Address, RunnerState

Reports = dict[NodeId, NodeReport]
Progress = tuple[InstancePhase, str]


# ---- which one ----


def ready_instances(state: ClusterState, model_id: ModelId) -> tuple[Instance, ...]:
    """The instances of a model that can serve now, by id."""
    reports = visible_reports(state)
    return tuple(each for each in state.instances if each.card.model_id == model_id and is_ready(each, reports))


def pick(state: ClusterState, model_id: ModelId, rank: Callable[[Instance], int] = lambda _: 0) -> Instance | Refused:
    """Of the ready instances of the lowest `rank` the one with the fewest requests; refused with the reason if there is
    none.
    """
    ready = ready_instances(state, model_id)
    if ready:
        reports = visible_reports(state)
        return min(ready, key=lambda each: (rank(each), request_count(each, reports), each.instance_id))
    placed = [each for each in state.instances if each.card.model_id == model_id]
    if placed:
        return Refused(instance_status(state, placed[0]).explanation, 503)
    wished = [each for each in state.wishes if each.card.model_id == model_id]
    if wished:
        return Refused(f"{model_id} is not placed: {wish_status(state, wished[0])}", 503)
    return Refused(f"{model_id} is not placed: `covey place {model_id}` places it.", 404)


def head_addresses(state: ClusterState, instance: Instance) -> tuple[Address, ...]:
    """Where this node reaches the head of an instance, in the order to be tried; empty unless it listens."""
    head, reports = instance.stages[0], visible_reports(state)
    report = runner_report(head, reports)
    return ways_to(report.data_address, reports[head.node_id], reports.get(state.node_id)) if report else ()


# ---- how far ----


def instance_status(state: ClusterState, instance: Instance) -> InstanceStatus:
    """One summary of an instance: the first of its nodes, downloads or runners that holds it up."""
    phase, text = _progress(state, instance)
    name = instance.card.model_id
    if phase is InstancePhase.FAILED:
        again = f"`covey place {name}` tries again, and `covey stop {instance.instance_id}` gives up on it."
        explanation = f"{name} {text}\n{again}"
    else:
        explanation = f"{name} is {text}." if phase is InstancePhase.READY else f"{name} is not ready: {text}."
    return InstanceStatus(phase, text, explanation)


def _progress(state: ClusterState, instance: Instance) -> Progress:
    reports = visible_reports(state)
    lost = [stage for stage in instance.stages if stage.node_id not in reports]
    if lost:
        return _lost(state, instance, ", ".join(_name(state, stage) for stage in lost))
    if is_ready(instance, reports):
        return InstancePhase.READY, "ready"
    failure, download = _failure(instance, reports), _download(instance, reports)
    return failure or download or _retry(instance, reports) or _lack(instance, reports) or _loading(instance, reports)


def _lost(state: ClusterState, instance: Instance, names: str) -> Progress:
    """Whether the nodes that are left could do without those of these names."""
    wish = next((each for each in state.wishes if each.wish_id == instance.wish_id), None)
    reason = _refusal_of(wish, nodes_of(state, (instance,))) if wish else ""
    if reason:
        return InstancePhase.LACKING, f"waiting for {names}, without which it finds no room: {reason.rstrip('.')}"
    return InstancePhase.WAITING, f"waiting for {names}"


@lru_cache(maxsize=16)  # every request that waits asks this of every snapshot; with tight memory many splits are tried
def _refusal_of(wish: Wish, nodes: tuple[Candidate, ...]) -> str:
    """Why the wish can't be placed on these nodes; empty where it can."""
    placement = place_at_all(wish.card, nodes, options_of(wish, nodes))
    return placement.reason if isinstance(placement, Refused) else ""


def wish_status(state: ClusterState, wish: Wish) -> str:
    """Why a wish has no instance: what placing it on the nodes that are here now says."""
    if any(each.wish_id == wish.wish_id for each in state.instances):
        return "assigned."
    return _refusal_of(wish, nodes_of(state)) or "the leader is about to assign it."


def _failure(instance: Instance, reports: Reports) -> Progress | None:
    """What nobody tries again, and a download that no other try cures: what it lacks is a person's to give."""
    for stage in instance.stages:
        report = runner_report(stage, reports)
        if report and has_given_up(report):
            return InstancePhase.FAILED, f"failed: {report.reason}"
        for each in _downloads(instance, stage, reports):
            if each.report.state is DownloadState.FAILED:
                return InstancePhase.FAILED, f"failed: {each.reason}"
    return None


def _download(instance: Instance, reports: Reports) -> Progress | None:
    """The download that is furthest behind, and why one waits to be tried again."""
    found = [each for stage in instance.stages for each in _downloads(instance, stage, reports)]
    ongoing = [each for each in found if each.report.state is DownloadState.ONGOING]
    if not ongoing:
        return None
    last = min(ongoing, key=lambda each: each.percent)
    if not any(each.report.bytes_done or each.report.reason for each in ongoing):
        of = f" of its {last.draft}" if last.draft else ""
        return InstancePhase.DOWNLOADING, f"looking for {'the' if of else 'its'} file{of}"  # it may well be there
    waiting = [each for each in ongoing if each.report.reason]
    again = "".join(f"; {each.node_name} tries again after a failure ({each.reason})" for each in waiting)
    its = f" its {last.draft}," if last.draft else ""
    return InstancePhase.DOWNLOADING, f"downloading{its} {last.percent} %{again}"


def _retry(instance: Instance, reports: Reports) -> Progress | None:
    """A runner that failed and is tried again. Of its reason the log is left out."""
    for stage in instance.stages:
        report = runner_report(stage, reports)
        if report and report.state is RunnerState.FAILED:
            reason = report.reason.partition("\n")[0]
            return InstancePhase.LOADING, f"{reports[stage.node_id].name} tries again after a failure ({reason})"
    return None


def _lack(instance: Instance, reports: Reports) -> Progress | None:
    """A runner that waits for memory which others use now, or for its former process to end."""
    for stage in instance.stages:
        report = runner_report(stage, reports)
        if report and report.waiting:
            return InstancePhase.WAITING, f"{reports[stage.node_id].name} {report.waiting}"
    return None


def _loading(instance: Instance, reports: Reports) -> Progress:
    runners = [runner_report(stage, reports) for stage in instance.stages]
    states = {each.state if each else RunnerState.IDLE for each in runners}
    parted = next((each for each in runners if each and each.state is RunnerState.PARTED), None)
    if parted:
        return InstancePhase.LOADING, f"linking its runners again ({parted.reason.partition(chr(10))[0].rstrip('.')})"
    loaded = sum(each.layers_loaded for each in runners if each and each.state not in LINKING_STATES)
    loaded //= instance.rank_count
    total = instance.card.layer_count
    if loaded >= total and RunnerState.LOADING not in states:
        return InstancePhase.LOADING, "warming up"
    if loaded or RunnerState.LOADING in states:
        return InstancePhase.LOADING, f"loading {loaded} of {total} layers"
    return InstancePhase.WAITING, f"{'starting' if RunnerState.IDLE in states else 'connecting'} its runners"


def nodes_of(state: ClusterState, leaving: Sequence[Instance] = ()) -> tuple[Candidate, ...]:
    """The nodes that a placement could use now if these instances ended, as this snapshot has them."""
    visible = visible_reports(state)
    away = [each.report for each in state.members if each.report and each.node_id not in visible]
    staying = [each for each in state.instances if each not in leaving]
    return candidates(tuple(visible.values()), away, staying, leaving)


# ---- what reports say ----


def visible_reports(state: ClusterState) -> Reports:
    """The reports of the nodes that are visible now."""
    return {
        member.node_id: member.report
        for member in state.members
        if member.report and member.visibility is Visibility.VISIBLE
    }


def is_ready(instance: Instance, reports: Reports) -> bool:
    """Whether all its runners serve, in one generation."""
    return all(stage.node_id in reports for stage in instance.stages) and seen_ones_serve(instance, reports)


def seen_ones_serve(instance: Instance, reports: Reports) -> bool:
    """Whether nothing is known against it but that some of its nodes are unheard."""
    found = [runner_report(stage, reports) for stage in instance.stages if stage.node_id in reports]
    serving = [each.attempt for each in found if each and each.state in SERVING_STATES]
    return len(serving) == len(found) and len(set(serving)) <= 1


def has_failed(instance: Instance, reports: Reports) -> bool:
    """Whether a runner of it has failed for good."""
    found = [runner_report(stage, reports) for stage in instance.stages]
    return any(has_given_up(each) for each in found if each)


def waits_for_memory(instance: Instance, reports: Reports) -> bool:
    """Whether a runner of it does not start for lack of memory, or because its former process does not end."""
    found = [runner_report(stage, reports) for stage in instance.stages]
    return any(each.waiting for each in found if each)


def have_parted(stages: Sequence[Stage], gone: RunnerReport | None, reports: Reports) -> bool:
    """Whether one of these stages' runners failed while it worked with one that was told of last as `gone`.

    Since then it may have begun anew, and wait for `gone` to follow. One that `gone` has not linked to, since it waits
    for a file or for memory, waits just so.
    """
    found = [runner_report(stage, reports) for stage in stages]
    return any(_has_left(each, gone) for each in found if each and gone and gone.data_address)


def _has_left(report: RunnerReport, gone: RunnerReport) -> bool:
    begins_anew = report.state in LINKING_STATES and report.attempt > gone.attempt and not report.waiting
    return report.state in (RunnerState.FAILED, RunnerState.PARTED) or begins_anew


def runner_report(stage: Stage, reports: Reports) -> RunnerReport | None:
    """What the stage's node says of its runner."""
    report = reports.get(stage.node_id)
    return next((each for each in report.runners if each.runner_id == stage.runner_id), None) if report else None


def candidates(
    reports: Sequence[NodeReport],
    away: Sequence[NodeReport],
    instances: Sequence[Instance],
    leaving: Sequence[Instance] = (),
) -> tuple[Candidate, ...]:
    """The nodes as a placement sees them, by id; those that have not told their memory are left out.

    `instances` are those that stay. What the runners of those that are `leaving` hold counts as free.

    A node that is away may come back and take what is assigned to it: on a machine that it shares that stays promised.
    """
    found = [_candidate(report, report.hardware, instances, leaving) for report in reports if report.hardware]
    found.sort(key=lambda node: node.node_id)
    owed = [(report.hardware.machine_id, _assigned_bytes(report, instances)) for report in away if report.hardware]
    for index, node in enumerate(found):
        if node.machine_id not in [other.machine_id for other in found[:index]]:
            more = sum(count for machine_id, count in owed if machine_id == node.machine_id)
            found[index] = replace(node, memory_bytes_promised=node.memory_bytes_promised + more)
    return tuple(found)


def _assigned_bytes(report: NodeReport, instances: Sequence[Instance]) -> int:
    stages = [stage for each in instances for stage in each.stages]
    return sum(stage.memory_bytes for stage in stages if stage.node_id == report.node_id)


def _candidate(
    report: NodeReport, hardware: Hardware, instances: Sequence[Instance], leaving: Sequence[Instance]
) -> Candidate:
    ending = {stage.runner_id for each in leaving for stage in each.stages if stage.node_id == report.node_id}

    def stays(runner: RunnerReport) -> bool:
        """Of one that is stuck nobody knows when it ends."""
        return runner.runner_id not in ending or runner.state is RunnerState.STUCK

    given_back = sum(each.resident_bytes for each in report.runners if not stays(each))
    held = sum(each.resident_bytes for each in report.runners if stays(each) and _is_measured(each))
    return Candidate(
        node_id=report.node_id,
        name=report.name,
        machine_id=hardware.machine_id,
        memory_bytes_total=hardware.memory_bytes_total,
        memory_bytes_free=hardware.memory_bytes_available + given_back,
        memory_bytes_promised=sum(_promised(stage, report) for each in instances for stage in each.stages),
        memory_bytes_held=held,
    )


def _promised(stage: Stage, report: NodeReport) -> int:
    """What a stage will still take of the memory that its node says is available."""
    if stage.node_id != report.node_id:
        return 0
    own = [each for each in report.runners if each.runner_id == stage.runner_id and _is_measured(each)]
    return still_to_take_bytes(stage.memory_bytes, own[0].resident_bytes if own else None)


def _is_measured(report: RunnerReport) -> bool:
    """Whether what it holds is known: it has loaded, maybe for a generation before this one."""
    return report.state in MEASURED_STATES or (report.resident_bytes > 0 and report.state in STARTED_STATES)


class _Download(Struct, frozen=True):
    """What a node of an instance says of a file that it needs. `draft`: which one it is of, if it is of one."""

    node_name: str
    draft: str
    report: DownloadReport

    @property
    def percent(self) -> int:
        return min(99, self.report.bytes_done * 100 // max(self.report.bytes_total, 1))

    @property
    def reason(self) -> str:
        return f"the {self.draft}: {self.report.reason}" if self.draft else self.report.reason


def _downloads(instance: Instance, stage: Stage, reports: Reports) -> list[_Download]:
    """Of the files that the stage needs, the model's first."""
    node = reports[stage.node_id]
    return [
        _Download(node.name, "" if card is instance.card else f"draft {card.model_id}", report)
        for card in cards_at(instance, stage)
        for report in node.downloads
        if report.model_id == card.model_id
    ]


def request_count(instance: Instance, reports: Reports) -> int:
    """Running and waiting, as the head's node reports."""
    report = runner_report(instance.stages[0], reports)
    return report.requests_running + report.requests_queued if report else 0


def _name(state: ClusterState, stage: Stage) -> str:
    """As its node calls itself now, or did when the stage was assigned."""
    report = next((member.report for member in state.members if member.node_id == stage.node_id), None)
    return report.name if report else stage.node_name or f"node {stage.node_id[:8]}"
