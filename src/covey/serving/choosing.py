"""Which instance a request goes to, how long it waits for one, and whether the one that it has can still answer."""

import time
from collections.abc import Awaitable, Callable
from typing import Final

from covey.control import routing
from covey.control.runner_table import LOADED_STATES
from covey.schema.cluster import ClusterState, Instance, InstancePhase, Refused
from covey.schema.ids import ModelId
from covey.schema.runner import RunnerState
from covey.serving.refusal import RefusedError

READY_S_MAX: Final = 120.0  # how long a request waits for a model that is placed and still loading
HAS_FILE: Final = (RunnerState.LOADING, *LOADED_STATES)  # of a runner: its model's file lies on this node


class Choosing:
    """`state` and `wait_changed` are the node's view of the cluster."""

    def __init__(
        self, state: Callable[[], ClusterState], wait_changed: Callable[[int, float], Awaitable[None]]
    ) -> None:
        self.state = state
        self.wait_changed = wait_changed

    async def ready(self, model_id: ModelId) -> Instance:
        """An instance that can answer; waits while one is on its way. Raises `RefusedError`."""
        deadline = time.monotonic() + READY_S_MAX
        while True:
            state = self.state()
            picked = routing.pick(state, model_id)
            if isinstance(picked, Instance):
                return picked
            left = deadline - time.monotonic()
            if left <= 0 or not is_coming(state, model_id):
                raise refusal(picked)
            await self.wait_changed(state.revision, left)

    def loss(self, instance: Instance) -> str | None:
        """Why it can't answer now, as a sentence; None as long as all its runners serve."""
        state = self.state()
        if routing.is_ready(instance, routing.visible_reports(state)):
            return None
        return routing.instance_status(state, instance).explanation.partition("\n")[0]


def held(state: ClusterState) -> list[Instance]:
    """The instances of which this node has a part, and so the model's file."""
    reports = [member.report for member in state.members if member.node_id == state.node_id and member.report]
    runners = [runner for report in reports for runner in report.runners if runner.state in HAS_FILE]
    ids = {runner.instance_id for runner in runners}
    return [instance for instance in state.instances if instance.instance_id in ids]


def is_coming(state: ClusterState, model_id: ModelId) -> bool:
    """Whether an instance of the model may become ready by itself."""
    placed = [instance for instance in state.instances if instance.card.model_id == model_id]
    failed = InstancePhase.FAILED
    return any(routing.instance_status(state, instance).phase is not failed for instance in placed)


def refusal(refused: Refused) -> RefusedError:
    hint = " POST /place_instance does the same." if refused.status == 404 else ""  # noqa: PLR2004 - HTTP
    return RefusedError(refused.reason + hint, refused.status)
