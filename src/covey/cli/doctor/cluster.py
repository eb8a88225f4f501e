"""Judges what a running node says of its cluster."""

from collections.abc import Collection, Iterator
from typing import Final

from covey.cli.console import harmless
from covey.cli.doctor.finding import Finding, ok, problem, warning
from covey.cli.doctor.network import MAC, MAC_ADVICE
from covey.control.routing import instance_status, visible_reports, waits_for_memory, wish_status
from covey.schema.cluster import ClusterState, Instance, InstancePhase, Member, NodeReport, Visibility

ROOM_ADVICE: Final = "Let more devices take part, free memory, or `covey stop` another model."
HELD_UP_ADVICE: Final = "Free memory there, or `covey stop` another model; `covey ps` shows how far this one is."
NOTICE_ADVICE: Final = "docs/network.md says what each sentence of the network means."


def node(url: str, state: ClusterState | None, failure: str) -> Finding:
    """`failure`: what else is there, or why it does not answer; empty with no `state` where nobody is."""
    if state is not None:
        name = next((each.name for each in _reports(state) if each.node_id == state.node_id), "A node")
        visible = sum(each.visibility is Visibility.VISIBLE for each in state.members)
        return ok("node", f"{harmless(name)} answers at {url} and sees {visible} of {len(state.members)} nodes.")
    if failure:
        return problem("node", failure, "End what is there, or name another node with --url.")
    return ok("node", f"None runs at {url}; this is what one would find.")


def cluster(state: ClusterState, own_version: str, platform: str, heard: Collection[str]) -> list[Finding]:
    """`heard`: the names of clusters that are told of already."""
    found = [*_notices(state, platform, heard), *_away(state), *_versions(state, own_version), *_models(state)]
    return found or [ok("cluster", "The node has nothing to complain of.")]


def starts(state: ClusterState) -> list[tuple[str, int]]:
    """Name of each other node that is here, and when it started by its clock: a boot counts seconds of the calendar."""
    return [(harmless(report.name), report.boot) for report in _reports(state) if report.node_id != state.node_id]


def _notices(state: ClusterState, platform: str, heard: Collection[str]) -> Iterator[Finding]:
    for sentence in state.notices:
        if any(name in sentence for name in heard):
            continue
        is_kept_out = platform == MAC and "multicast does not work" in sentence
        yield warning("network", _whole(sentence), MAC_ADVICE if is_kept_out else NOTICE_ADVICE)
    for report in _reports(state):
        for sentence in report.notices:
            advice = f"See to it on {harmless(report.name)}: `covey doctor` there says more."
            yield warning("node", f"{harmless(report.name)} says: {harmless(sentence)}.", advice)


def _away(state: ClusterState) -> Iterator[Finding]:
    for member in state.members:
        if member.visibility is Visibility.AWAY:
            seen = f"{_name(member)} has not been heard for {member.heard_ms_ago // 1000} s."
            yield warning("nodes", seen, "Look whether it is on, awake, and in this network.")


def _versions(state: ClusterState, own_version: str) -> Iterator[Finding]:
    for report in _reports(state):
        if report.version != own_version:
            seen = f"{harmless(report.name)} runs Covey {harmless(report.version)}, and this is {own_version}."
            yield warning("versions", seen, "Install the same version on all devices, and start their nodes anew.")


def _models(state: ClusterState) -> Iterator[Finding]:
    for instance in state.instances:
        yield from _instance(state, instance)
    served = {instance.wish_id for instance in state.instances}
    for wish in state.wishes:
        if wish.wish_id not in served:
            seen = f"{wish.card.model_id} waits for a place: {wish_status(state, wish)}"
            yield warning("models", _whole(seen), ROOM_ADVICE)


def _instance(state: ClusterState, instance: Instance) -> Iterator[Finding]:
    """Also of one that waits for what may not come by itself; what merely takes its time is no trouble."""
    status, name = instance_status(state, instance), instance.card.model_id
    if status.phase is InstancePhase.FAILED:
        reason = status.text.partition("\n")[0]  # what follows is its log
        advice = f"`covey place {name}` tries again, and `covey stop {name}` gives up on it."
        yield problem("models", _whole(f"{name} {reason}"), advice)
    elif status.phase is InstancePhase.LACKING:
        yield warning("models", _whole(status.explanation), ROOM_ADVICE)
    elif status.phase is InstancePhase.WAITING and waits_for_memory(instance, visible_reports(state)):
        yield warning("models", _whole(status.explanation), HELD_UP_ADVICE)


def _reports(state: ClusterState) -> list[NodeReport]:
    return [each.report for each in state.members if each.report and each.visibility is Visibility.VISIBLE]


def _name(member: Member) -> str:
    return harmless(member.report.name) if member.report else member.node_id[:8]


def _whole(sentence: str) -> str:
    clean = harmless(sentence).strip()
    clean = f"{clean[:1].upper()}{clean[1:]}"
    return clean if clean.endswith((".", "?", "!")) else f"{clean}."
