"""Whether an instance can answer, as the snapshot's reports tell it. Pure.

(`control` has its own routing for requests; this room may not see it, and only tells clients what they wait for.)
"""

from covey.schema.cluster import ClusterState, Instance, RunnerReport, Visibility
from covey.schema.ids import RunnerId
from covey.schema.runner import RunnerState

ANSWERING = frozenset({RunnerState.READY, RunnerState.RUNNING})


def runner_reports(state: ClusterState) -> dict[RunnerId, RunnerReport]:
    """What the nodes say of their runners."""
    reports = (member.report for member in state.members)
    return {runner.runner_id: runner for report in reports if report for runner in report.runners}


def is_ready(state: ClusterState, instance: Instance) -> bool:
    """Whether every stage is up, on a node that is visible, and all belong to the same attempt."""
    visible = {member.node_id for member in state.members if member.visibility is Visibility.VISIBLE}
    runners = runner_reports(state)
    attempts: set[int] = set()
    for stage in instance.stages:
        runner = runners.get(stage.runner_id)
        if stage.node_id not in visible or runner is None or runner.state not in ANSWERING:
            return False
        attempts.add(runner.attempt)
    return len(attempts) == 1


def describe(state: ClusterState, instance: Instance) -> str:
    """One sentence about what the instance waits for: the first stage that failed, else the first not up."""
    runners = runner_reports(state)
    names = {member.node_id: member.report.name for member in state.members if member.report}
    waiting = ""
    for stage in instance.stages:
        runner = runners.get(stage.runner_id)
        name = names.get(stage.node_id, stage.node_id)
        if runner is None:
            waiting = waiting or f"{name} has not reported its runner yet."
        elif runner.state is RunnerState.FAILED:
            return f"The runner on {name} failed: {runner.reason}"
        elif runner.state not in ANSWERING:
            waiting = waiting or f"The runner on {name} is in state {runner.state}."
    return waiting or "A node of the instance is away, or a runner is starting anew."
