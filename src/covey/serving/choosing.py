"""Which instance a request goes to, how long it waits for one, and whether the one that it has can still answer."""

import time
from collections.abc import Awaitable, Callable
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from covey.control import routing
from covey.control.runner_table import LOADED_STATES
from covey.schema.cluster import ClusterState, Instance, InstancePhase, Refused
from covey.schema.ids import InstanceId, ModelId
from covey.schema.model import KvCacheType, ModelCard, Quantizing
from covey.schema.runner import RunnerState
from covey.serving.lines import Lines
from covey.serving.refusal import RefusedError

READY_S_MAX: Final = 600.0  # how long a request waits for a model that is placed and still loading
RETURN_S: Final = 5.0  # ... for a node without which there is no room for it, and which may be unheard by chance
RETURN_S_BEGUN: Final = 30.0  # the same where an answer has begun: one that restarts is back by then
LOOK_S: Final = 1.0  # that these are over is no change of the state
HAS_FILE: Final = (RunnerState.LOADING, *LOADED_STATES)  # of a runner: its model's file lies on this node


class Loss(Struct, frozen=True):
    """Why an instance can't answer now, as a sentence. `may_pass`: its nodes may only be unheard for a moment."""

    reason: str
    may_pass: bool


class Needs(Struct, frozen=True):
    """What an instance must have to take an answer, or the rest of one, and what it had better have."""

    card: ModelCard
    room: int  # tokens of context: those there are, and the next
    whole_room: int  # for as long an answer as is wanted
    exact: bool = False  # it was begun so, and must not go on otherwise
    quantize: Quantizing | None = None  # the same
    kv_cache: KvCacheType = KvCacheType.F32  # the same, where it is exact
    unreached: frozenset[InstanceId] = frozenset()  # by this node, just now

    def are_met_by(self, instance: Instance) -> bool:
        is_exact_enough = not self.exact or (instance.exact and instance.kv_cache is self.kv_cache)
        has_same_weights = (instance.card, instance.quantize) == (self.card, self.quantize)
        return has_same_weights and instance.context_length >= self.room and is_exact_enough

    def rank(self, instance: Instance) -> int:
        """The lower, the better."""
        return 2 * (instance.instance_id in self.unreached) + (instance.context_length < self.whole_room)


class Patience:
    """How long one request goes on waiting: a node that is missing has `return_s` from when it is missing."""

    def __init__(self, now_s: float, return_s: float) -> None:
        self._deadline_s = now_s + READY_S_MAX
        self._return_s = return_s
        self._lacking_since_s: float | None = None

    def left_s(self, now_s: float, *, lacks: bool) -> float:
        """`lacks`: whether the model waits for such a node now."""
        if not lacks:
            self._lacking_since_s = None
            return self._deadline_s - now_s
        if self._lacking_since_s is None:
            self._lacking_since_s = now_s
        return min(self._deadline_s, self._lacking_since_s + self._return_s) - now_s


class Choosing:
    """`state` and `wait_changed` are the node's view of the cluster."""

    def __init__(
        self, state: Callable[[], ClusterState], wait_changed: Callable[[int, float], Awaitable[None]]
    ) -> None:
        self.state = state
        self.wait_changed = wait_changed
        self._lines = Lines()

    async def ready(
        self, model_id: ModelId, account: str, needs: Needs | None = None, *, has_begun: bool = False
    ) -> Instance:
        """An instance that can answer; waits while one is on its way, as one of so many. Raises `RefusedError`."""
        patience = Patience(time.monotonic(), RETURN_S_BEGUN if needs else RETURN_S)
        found = self._look(model_id, needs, patience)
        if isinstance(found, Instance):
            return found
        with self._lines.waiting(model_id, account, has_begun=has_begun) as waiter:
            while not isinstance(found, Instance):
                with waiter.ends_waits():
                    await self.wait_changed(*found)
                found = self._look(model_id, needs, patience)
        return found

    def _look(self, model_id: ModelId, needs: Needs | None, patience: Patience) -> Instance | tuple[int, float]:
        """An instance, or the revision of the state that has none and how long to wait for another, in seconds. Raises
        `RefusedError` if it is no use to wait.
        """
        whole = self.state()
        state = _with_those_that_fit(whole, needs) if needs else whole
        picked = routing.pick(state, model_id, needs.rank) if needs else routing.pick(state, model_id)
        if isinstance(picked, Instance):
            return picked
        left = patience.left_s(time.monotonic(), lacks=is_lacking(state, model_id))
        if left <= 0 or not is_coming(state, model_id):
            raise _other_file(model_id) if is_coming(whole, model_id) and left > 0 else refusal(picked)
        return whole.revision, min(left, LOOK_S)

    def roomier(self, instance: Instance, room: int) -> Instance:
        """Another one of the same file that is ready and holds so many tokens, if this does not."""
        if instance.context_length >= room:
            return instance
        needs = Needs(instance.card, room, room, instance.exact, instance.quantize, instance.kv_cache)
        state = _with_those_that_fit(self.state(), needs)
        picked = routing.pick(state, instance.card.model_id)
        return picked if isinstance(picked, Instance) else instance

    def loss(self, instance: Instance, needs: Needs) -> Loss | None:
        """None as long as all its runners serve. Others that meet the `needs` make it no use to wait."""
        state = self.state()
        if not any(each.instance_id == instance.instance_id for each in state.instances):
            return Loss(f"{instance.card.model_id} was taken off its nodes while it answered.", may_pass=False)
        reports = routing.visible_reports(state)
        if routing.is_ready(instance, reports):
            return None
        reason = routing.instance_status(state, instance).explanation.partition("\n")[0]
        others = routing.ready_instances(_with_those_that_fit(state, needs), instance.card.model_id)
        return Loss(reason, may_pass=not others and routing.seen_ones_serve(instance, reports))


def _with_those_that_fit(state: ClusterState, needs: Needs) -> ClusterState:
    return replace(state, instances=tuple(each for each in state.instances if needs.are_met_by(each)))


def _other_file(model_id: ModelId) -> RefusedError:
    return RefusedError(f"Another file goes by the name of {model_id} now, or its context is shorter.", 503)


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


def is_lacking(state: ClusterState, model_id: ModelId) -> bool:
    """Whether all instances of the model wait for nodes without which there is no room for it."""
    placed = [instance for instance in state.instances if instance.card.model_id == model_id]
    return all(routing.instance_status(state, each).phase is InstancePhase.LACKING for each in placed)


def refusal(refused: Refused) -> RefusedError:
    hint = " POST /place_instance does the same." if refused.status == 404 else ""  # noqa: PLR2004 - HTTP
    return RefusedError(refused.reason + hint, refused.status)
