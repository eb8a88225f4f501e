"""The runners assigned to this node: what they should be doing, minus what they are doing.

An instance runs as one generation, which the runners' attempt numbers count; each node decides for its own runners
from the others' reports, with these rules:

1. While any runner of an instance is reported as failed, or as waiting for memory, the others stop and wait: they
   would hold what another instance could run with, and each of the two would wait for the other.
2. A failed runner waits for its back-off, then opens a new generation: one more than the highest attempt seen. That its
   instance is dormant for a while neither shortens the wait nor refills the budget.
3. Everybody else follows the highest attempt seen.
4. A runner whose next stage's node has started anew since it linked to it opens a new generation too.

Attempts only grow, so all runners end in one generation; a runner whose budget is used up stays failed, and by the
first rule the others stay stopped.

A process that takes too long for its phase is ended (`deadlines`). The next one starts once it is reaped and a probe
has seen what is free without it.

A runner starts when its node has the memory for it. Where it has not, that is no failure: others may give back what
they use, so it is looked at again with every probe. Nothing is said of memory while another runner takes or gives
back some, nor before the first probe after that: the figures would count it twice, or not at all.
"""

from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from covey.control.addresses import ways_to
from covey.control.deadlines import due_ms, overdue
from covey.control.placement.memory import still_to_take_bytes
from covey.control.placement.refusal import amount
from covey.control.runner_table import (
    MEASURED_STATES,
    MOVING_STATES,
    SERVING_STATES,
    STARTED_STATES,
    Begin,
    Link,
    Proceed,
    Retry,
    Runner,
    Stop,
    can_step,
    step,
)
from covey.control.settings import COUNTER_LEAP_MAX, RUNNERS_REMEMBERED_MAX, MachineSettings
from covey.schema.cluster import Instance, NodeReport, RunnerReport, Stage
from covey.schema.ids import ModelId, NodeId, RunnerId
from covey.schema.machine import Effect, RunnerExited, RunnerSaid, RunnerStarted
from covey.schema.runner import Address, PhaseFailed, RunnerMessage, RunnerSpec, RunnerState


class Neighbour(Struct, frozen=True):
    """Another runner of the same instance, as its node last reported it."""

    boot: int
    report: RunnerReport


class World(Struct, frozen=True):
    """What runners look at beside themselves: intent, the nodes' reports, and the model files that are here."""

    instances: Sequence[Instance]
    reports: dict[NodeId, NodeReport]
    paths: Mapping[ModelId, str]
    memory_bytes_free: int | None  # on this node now; None: not known yet, so nothing starts
    is_memory_fresh: bool  # no runner has started, loaded or ended since


class Runners:
    """The runners of this node. `revision` grows when its report would differ."""

    def __init__(self, node_id: NodeId, boot: int, settings: MachineSettings) -> None:
        self.node_id = node_id
        self.boot = boot
        self.settings = settings
        self.runners: dict[RunnerId, Runner] = {}
        self.former: dict[RunnerId, Runner] = {}  # not assigned any more, the latest `RUNNERS_REMEMBERED_MAX`
        self.revision = 0

    # ---- answers ----

    def hear(self, now_ms: int, news: RunnerStarted | RunnerSaid | RunnerExited) -> list[Effect]:
        """What a process did or said; a former attempt's word is dropped."""
        runner = self.runners.get(news.runner_id)
        if runner is None or runner.attempt != news.attempt or not runner.has_process:
            return []
        runner.heard_ms = now_ms
        effects = self._step(runner, self._word(runner, news.message) if isinstance(news, RunnerSaid) else news)
        self._note(now_ms, runner)
        _keep_time(now_ms, runner)
        return effects

    @staticmethod
    def _word(runner: Runner, message: RunnerMessage) -> RunnerMessage:
        """What a process said; out of turn it is a failure of that process, not of this node."""
        if can_step(runner, message):
            return message
        return PhaseFailed("protocol", f"the runner said {type(message).__name__} while {runner.state}")

    def _note(self, now_ms: int, runner: Runner) -> None:
        """Keeps the times that back-off and budget are counted from."""
        if runner.state in SERVING_STATES:
            runner.serving_since_ms = now_ms if runner.serving_since_ms is None else runner.serving_since_ms
            return
        steps = self.settings.runner_back_off_ms
        since, runner.serving_since_ms = runner.serving_since_ms, None
        if since is not None and now_ms - since >= self.settings.runner_healthy_ms:
            runner.retries_left = len(steps)
        if runner.has_failed and not runner.has_process and runner.retries_left:
            runner.retry_ms = now_ms + steps[len(steps) - runner.retries_left]

    def measure(self, resident_bytes: Mapping[int, int]) -> None:
        """What the processes hold now, by process id: of those that have loaded, whose caches fill as they serve.

        The memory of those that have ended is not among it, so that others may start in their place.
        """
        for runner in self.runners.values():
            runner.is_seen_gone = not runner.has_process
            if runner.state in MEASURED_STATES and runner.process_id in resident_bytes:
                runner.resident_bytes = resident_bytes[runner.process_id]

    def wake(self, now_ms: int) -> None:
        """Our machine slept, and the processes with it: their time begins anew."""
        for runner in self.runners.values():
            runner.phase_since_ms = runner.heard_ms = now_ms

    # ---- desired minus actual ----

    def advance(self, now_ms: int, world: World) -> list[Effect]:
        """Everything that is due for any runner."""
        self._assign(world.instances)
        effects: list[Effect] = []
        for runner in list(self.runners.values()):
            effects += self._advance_one(now_ms, runner, world)
            _keep_time(now_ms, runner)
            if runner.state is RunnerState.SHUTDOWN:
                self._forget(runner)
        return effects

    def deadline(self) -> int | None:
        """When the next back-off, spacing, or time for a phase ends."""
        spacing = self.settings.runner_spacing_ms
        times = [runner.retry_ms for runner in self.runners.values()]
        times += [due_ms(runner, self.settings.limits) for runner in self.runners.values()]
        times += [
            runner.started_ms + spacing
            for runner in self.runners.values()
            if runner.started_ms is not None and not runner.has_process and runner.wanted
        ]
        return min((time for time in times if time is not None), default=None)

    def reports(self) -> tuple[RunnerReport, ...]:
        """What this node says of its runners, by id."""
        return tuple(self.runners[runner_id].report() for runner_id in sorted(self.runners))

    def held_bytes(self) -> dict[tuple[RunnerId, int], int]:
        """Memory of each process, by runner and attempt, as of the last probe since it has loaded; 0 before."""
        running = [runner for runner in self.runners.values() if runner.has_process]
        return {(runner.stage.runner_id, runner.attempt): runner.resident_bytes for runner in running}

    @property
    def are_gone(self) -> bool:
        """Whether nothing is left that could still be ended."""
        return all(runner.state is RunnerState.STUCK for runner in self.runners.values())

    def knows(self, process_ids: Iterable[int]) -> bool:
        """Whether all of these are processes of ours that have not ended, as far as we have heard."""
        return {*process_ids} <= {runner.process_id for runner in self.runners.values()}

    def notices(self) -> tuple[str, ...]:
        """What a person should know: one sentence each."""
        stuck = [runner for runner in self.runners.values() if runner.state is RunnerState.STUCK]
        return tuple(f"this node {runner.waiting}." for runner in stuck)

    @property
    def is_memory_moving(self) -> bool:
        """Whether one of them is taking memory or giving it back, so that a probe sees a part of that."""
        return any(runner.has_process and runner.state in MOVING_STATES for runner in self.runners.values())

    def _assign(self, instances: Sequence[Instance]) -> None:
        """Makes a record for what is newly assigned, and marks what no longer is."""
        assigned: dict[RunnerId, tuple[Instance, Stage]] = {}
        for instance in instances:
            for stage in instance.stages:
                if stage.node_id == self.node_id:
                    assigned[stage.runner_id] = (instance, stage)
        for runner_id, (instance, stage) in assigned.items():
            if runner_id not in self.runners:
                self.runners[runner_id] = self._record(instance, stage)
                self.revision += 1
        for runner_id, runner in self.runners.items():
            runner.wanted = runner_id in assigned

    def _record(self, instance: Instance, stage: Stage) -> Runner:
        """A fresh one, or one that goes on where it was assigned before: its attempts, its budget, its back-off."""
        former = self.former.pop(stage.runner_id, None)
        if former is None:
            budget = len(self.settings.runner_back_off_ms)
            return Runner(instance, stage, self.settings.limits.shut_down_ms // 2, retries_left=budget)
        state = RunnerState.FAILED if former.has_failed else RunnerState.IDLE
        return replace(former, instance=instance, stage=stage, state=state, waiting="")

    def _forget(self, runner: Runner) -> None:
        self.revision += 1
        self.former[runner.stage.runner_id] = self.runners.pop(runner.stage.runner_id)
        if len(self.former) > RUNNERS_REMEMBERED_MAX:
            self.former.pop(next(iter(self.former)))

    def _advance_one(self, now_ms: int, runner: Runner, world: World) -> list[Effect]:
        """At most two steps lie between what a runner is and what it should be: stop, or go on."""
        late = overdue(now_ms, runner, self.settings.limits)
        if late:
            return self._step(runner, late)
        others = _neighbours(runner, world.reports)
        generation = max([runner.attempt, *(other.report.attempt for other in others.values())])
        if self._must_stop(runner, others, generation):
            return self._step(runner, Stop())
        if runner.state is RunnerState.FAILED and runner.retry_ms is not None and now_ms >= runner.retry_ms:
            self._step(runner, Retry(generation + 1))
        if runner.state is RunnerState.IDLE and not runner.has_process:
            return self._begin(now_ms, runner, others, world)
        if runner.state is RunnerState.CONNECTING and runner.linked_to is None:
            return self._link(runner, others, world.reports)
        if runner.state in (RunnerState.CONNECTED, RunnerState.LOADED):
            return self._step(runner, Proceed())
        return []

    def _must_stop(self, runner: Runner, others: dict[int, Neighbour], generation: int) -> bool:
        if runner.state in (RunnerState.SHUTTING_DOWN, RunnerState.STUCK, RunnerState.SHUTDOWN):
            return False
        if not runner.wanted:
            return True
        if not runner.has_process or runner.state not in STARTED_STATES:
            return False
        return _is_held_up(others) or generation > runner.attempt or self._lost_neighbour(runner, others)

    @staticmethod
    def _lost_neighbour(runner: Runner, others: dict[int, Neighbour]) -> bool:
        """Whether the next stage's node was started anew since we linked to it."""
        following = others.get(_next_index(runner))
        return following is not None and runner.linked_to is not None and following.boot > runner.linked_to

    def _begin(self, now_ms: int, runner: Runner, others: dict[int, Neighbour], world: World) -> list[Effect]:
        path = world.paths.get(runner.instance.card.model_id)
        last = runner.started_ms
        too_soon = last is not None and now_ms < last + self.settings.runner_spacing_ms
        if path is None or too_soon or not runner.is_seen_gone:
            return []
        if not self._has_room(runner, others, world) or _is_held_up(others):
            return []
        return self._step(runner, Begin(_open_generation(runner, others), self._spec(runner, path), now_ms))

    def _has_room(self, runner: Runner, others: dict[int, Neighbour], world: World) -> bool:
        """Whether what is free and not promised to others here is enough; if it surely is not, `runner` waits."""
        if world.memory_bytes_free is None:
            return False
        lack = self._lack(runner, world.memory_bytes_free)
        if lack and (self.is_memory_moving or not world.is_memory_fresh):
            return False  # a later probe tells
        if lack and not runner.waiting:
            runner.attempt = _open_generation(runner, others) + 1  # the others stop, and begin in this one with it
        self.revision += lack != runner.waiting
        runner.waiting = lack
        return not lack

    def _lack(self, runner: Runner, free_bytes: int) -> str:
        """What is missing for `runner`; nothing if it fits into what is free and not promised to others here.

        Placement leaves a margin of what is free to the machine's owner. What has shrunk since then may use it up.
        """
        promised = sum(
            still_to_take_bytes(each.stage.memory_bytes, each.resident_bytes or None)
            for each in self.runners.values()
            if each.has_process
        )
        if runner.stage.memory_bytes + promised <= free_bytes:
            return ""
        taken = f", {amount(promised)} of that promised to others," if promised else ","
        return f"has too little memory now: {amount(free_bytes)} free{taken} {amount(runner.stage.memory_bytes)} needed"

    def _link(self, runner: Runner, others: dict[int, Neighbour], reports: dict[NodeId, NodeReport]) -> list[Effect]:
        """Once all stages listen: a link that waits for a stage whose file is still coming would run out of time."""
        stages = {**others, _index(runner): Neighbour(self.boot, runner.report())}
        listening = [
            each for each in stages.values() if each.report.attempt == runner.attempt and each.report.data_address
        ]
        if len(listening) < len(runner.instance.stages):
            return []
        before, following = (_index(runner) - 1) % len(stages), _next_index(runner)
        ways = [self._ways(runner, stages, index, reports) for index in (following, before)]
        return self._step(runner, Link(stages[following].boot, *ways))

    def _ways(
        self, runner: Runner, stages: dict[int, Neighbour], index: int, reports: dict[NodeId, NodeReport]
    ) -> tuple[Address, ...]:
        there = reports.get(runner.instance.stages[index].node_id)
        return ways_to(stages[index].report.data_address, there, reports.get(self.node_id))

    def _step(self, runner: Runner, news: object) -> list[Effect]:
        self.revision += 1
        return step(runner, news)

    def _spec(self, runner: Runner, path: str) -> RunnerSpec:
        instance = runner.instance
        return RunnerSpec(
            runner_id=runner.stage.runner_id,
            instance_id=instance.instance_id,
            engine=instance.engine,
            engine_options=self.settings.engine_options | ({"exact": "1"} if instance.exact else {}),
            model_path=path,
            vocabulary_size=instance.card.vocabulary_size,
            shard=runner.stage.shard,
            stage_index=_index(runner),
            stage_count=len(instance.stages),
            stage_node_ids=tuple(stage.node_id for stage in instance.stages),
            context_length=instance.context_length,
            slot_count=instance.slot_count,
            thread_count=self.settings.thread_count,
            listen_host=self.settings.listen_host,
            connect_ms=self.settings.limits.connect_ms * 2 // 3,  # so that it can say who was not reached
        )


def _keep_time(now_ms: int, runner: Runner) -> None:
    """The time of a phase begins anew with each thing that the process, or we, have done."""
    loaded, answered = (runner.layers_loaded, runner.bytes_loaded), (runner.steps, runner.is_busy)
    progress = (runner.state, runner.attempt, runner.has_process, runner.linked_to, loaded, answered)
    if progress != runner.progress:
        runner.progress, runner.phase_since_ms = progress, now_ms


def _index(runner: Runner) -> int:
    return runner.instance.stages.index(runner.stage)


def _next_index(runner: Runner) -> int:
    return (_index(runner) + 1) % len(runner.instance.stages)


def _neighbours(runner: Runner, reports: dict[NodeId, NodeReport]) -> dict[int, Neighbour]:
    """The other runners of the instance that have been reported, by stage, but for those whose attempt is made up."""
    highest = runner.attempt + COUNTER_LEAP_MAX
    found: dict[int, Neighbour] = {}
    for index, stage in enumerate(runner.instance.stages):
        report = reports.get(stage.node_id)
        if stage == runner.stage or report is None:
            continue
        for each in report.runners:
            if each.runner_id == stage.runner_id and each.attempt <= highest:
                found[index] = Neighbour(report.boot, each)
    return found


def _is_held_up(others: dict[int, Neighbour]) -> bool:
    """Whether another runner of the instance can't go on, so that none of them can."""
    return any(other.report.state is RunnerState.FAILED or other.report.waiting for other in others.values())


def _open_generation(runner: Runner, others: dict[int, Neighbour]) -> int:
    """The attempt that a new process of `runner` begins with: the highest seen, unless it has used that one."""
    latest = max((other.report.attempt for other in others.values()), default=0)
    return max(runner.last_attempt + 1, runner.attempt, latest)
