"""The runners assigned to this node: what they should be doing, minus what they are doing.

An instance runs as one generation, which the runners' attempt numbers count; each node decides for its own runners
from the others' reports, with these rules:

1. A process outlives its generation: it keeps what it has loaded, links anew, and reads only what it lacks. So does one
   whose node got another part of the same model, under another assignment: what it holds is kept as far as the engine
   can (`engine/contract`).
2. While a runner of an instance waits for memory, or is reported as failed for good, the others end: they would hold
   what another instance could run with, and each of the two would wait for the other.
3. A failed runner waits for its back-off, then opens a new generation: one more than the highest attempt seen. That its
   instance is dormant for a while neither shortens the wait nor refills the budget. One that has merely lost a link
   does so too, unless a failed one will; it does so for as long as it takes, since cables are plugged in again.
4. Everybody else follows the highest attempt seen.
5. A runner opens a new generation too when a node has started anew since it linked to that: the next stage's, or one
   of those that share its layers.
6. Where ranks share layers, none warms up before all of them have loaded: they compute together.

Attempts only grow, so all runners end in one generation; a runner whose budget is used up stays failed, and by the
second rule the others end.

A process that takes too long for its phase is ended (`deadlines`). The next one starts once it is reaped and a probe
has seen what is free without it.

A runner starts when its node has the memory for it. Where it has not, that is no failure: others may give back what
they use, so it is looked at again with every probe. Nothing is said of memory while another runner takes or gives
back some, nor before the first probe after that: the figures would count it twice, or not at all.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from covey.control.addresses import ways_to
from covey.control.companions import (
    Neighbour,
    can_warm_up,
    has_failed,
    index_of,
    is_alike,
    is_given_up,
    linked_runners,
    neighbours,
    open_generation,
)
from covey.control.deadlines import due_ms, halted, overdue
from covey.control.placement.again import overlap
from covey.control.placement.memory import loading_bytes, still_to_take_bytes
from covey.control.placement.refusal import amount
from covey.control.runner_table import (
    MEASURED_STATES,
    MOVING_STATES,
    REGROUPED_STATES,
    SERVING_STATES,
    STARTED_STATES,
    Begin,
    Link,
    Overdue,
    Proceed,
    ProcessKey,
    Regroup,
    Retry,
    Runner,
    Stop,
    can_step,
    inherit,
    step,
)
from covey.control.settings import RUNNERS_REMEMBERED_MAX, MachineSettings
from covey.schema.cluster import Instance, NodeReport, RunnerReport, Stage
from covey.schema.ids import ModelId, NodeId, RunnerId
from covey.schema.machine import Effect, RunnerExited, RunnerHalted, RunnerSaid, RunnerStarted
from covey.schema.model import KvCacheType
from covey.schema.pipeline import cards_at, leaders, ranks_of, stage_count, stage_index
from covey.schema.runner import BEAT_MS, Address, Draft, PhaseFailed, RunnerMessage, RunnerSpec, RunnerState

RunnerNews = RunnerStarted | RunnerSaid | RunnerHalted | RunnerExited


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

    def hear(self, now_ms: int, news: RunnerNews) -> list[Effect]:
        """What a process did or said, or was seen to suffer; a former attempt's word is dropped."""
        runner = self._with_process((news.runner_id, news.attempt))
        if runner is None:
            return []
        if isinstance(news, RunnerHalted):  # no sign of life
            late = halted(runner, news.seen_ms)
            return self._end(now_ms, runner, late) if late else []
        runner.heard_ms = now_ms
        effects = self._step(runner, self._word(runner, news.message) if isinstance(news, RunnerSaid) else news)
        self._note(now_ms, runner)
        _keep_time(now_ms, runner)
        return effects

    def _with_process(self, key: ProcessKey) -> Runner | None:
        return next((each for each in self.runners.values() if each.has_process and each.key == key), None)

    @staticmethod
    def _word(runner: Runner, message: RunnerMessage) -> RunnerMessage:
        """What a process said; out of turn it is a failure of that process, not of this node."""
        if can_step(runner, message):
            return message
        return PhaseFailed("protocol", f"the runner said {type(message).__name__} while {runner.state}")

    def _note(self, now_ms: int, runner: Runner) -> None:
        """Keeps the times that back-off and budget are counted from. What has come to serve is never given up: what it
        was asked may have killed it, and whoever asks gives up first.
        """
        if runner.state in SERVING_STATES:
            runner.serving_since_ms = now_ms if runner.serving_since_ms is None else runner.serving_since_ms
            return
        steps = self.settings.runner_back_off_ms
        if self._was_well(now_ms, runner):
            runner.was_well, runner.retries_left, runner.partings = True, len(steps), min(runner.partings, 1)
        elif runner.serving_since_ms is not None:
            runner.retries_left = max(runner.retries_left, 1)
        runner.serving_since_ms, runner.working_beats = None, 0
        if runner.state is RunnerState.PARTED and runner.retry_ms is None:
            runner.retry_ms = now_ms + (0 if runner.was_well else steps[min(runner.partings, len(steps)) - 1])
        if runner.has_failed and not runner.has_process and runner.retries_left:
            runner.retry_ms = now_ms + (0 if runner.was_well else steps[len(steps) - runner.retries_left])

    def _was_well(self, now_ms: int, runner: Runner) -> bool:
        """Whether it served for a while: less long if it worked all the while. The time that it hung does not count."""
        since_ms, until_ms = runner.serving_since_ms, runner.progressed_ms if runner.is_overdue else now_ms
        is_healthy = since_ms is not None and until_ms - since_ms >= self.settings.runner_healthy_ms
        return is_healthy or runner.working_beats * BEAT_MS >= self.settings.runner_proven_ms

    def measure(self, resident_bytes: Mapping[int, int]) -> None:
        """What the processes hold now, by process id: of those that have loaded, whose caches fill as they serve.

        The memory of those that have ended is not among it, so that others may start in their place.
        """
        for runner in self.runners.values():
            runner.is_seen_gone = not runner.has_process
            is_known = runner.state in MEASURED_STATES or runner.resident_bytes
            if is_known and runner.process_id in resident_bytes:
                runner.resident_bytes = resident_bytes[runner.process_id]

    def wake(self, now_ms: int, slept_ms: int) -> None:
        """Our machine slept, and the processes with it: their limits begin anew, and it was no time of work."""
        for runner in self.runners.values():
            runner.phase_since_ms = runner.heard_ms = now_ms
            runner.progressed_ms += slept_ms
            if runner.serving_since_ms is not None:
                runner.serving_since_ms += slept_ms
            if runner.ending_since_ms is not None:
                runner.ending_since_ms = now_ms

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

    def held_bytes(self) -> dict[ProcessKey, int]:
        """Memory of each process as of the last probe since it has loaded; 0 before."""
        return {runner.key: runner.resident_bytes for runner in self.runners.values() if runner.has_process}

    def keys(self) -> dict[RunnerId, ProcessKey]:
        """What the driver knows the runners' processes as."""
        return {runner_id: runner.key for runner_id, runner in self.runners.items()}

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
                self.runners[runner_id] = self._record(instance, stage, assigned)
                self.revision += 1
        for runner_id, runner in self.runners.items():
            runner.wanted = runner_id in assigned

    def _donor(self, instance: Instance, stage: Stage, assigned: Collection[RunnerId]) -> Runner | None:
        """A runner that is not wanted any more, and whose process holds a part of what this stage is to be."""
        found = [
            each
            for runner_id, each in self.runners.items()
            if runner_id not in assigned and each.has_process and each.state in STARTED_STATES
            if each.holds and overlap(each.holds, stage.shard) and is_alike(each.instance, instance)
            if each.stage.rank == stage.rank
        ]
        return max(found, key=lambda each: overlap(each.holds or each.stage.shard, stage.shard), default=None)

    def _record(self, instance: Instance, stage: Stage, assigned: Collection[RunnerId]) -> Runner:
        """A fresh one, or one that goes on where it was assigned before: its attempts, its budget, its back-off.

        If it needs not wait it takes over a process that another one does not need any more.
        """
        former = self.former.pop(stage.runner_id, None)
        if former is None:
            budget = len(self.settings.runner_back_off_ms)
            runner = Runner(instance, stage, self.settings.limits.shut_down_ms // 2, retries_left=budget)
        else:
            state = RunnerState.FAILED if former.has_failed else RunnerState.IDLE
            runner = replace(former, instance=instance, stage=stage, state=state, waiting="")
        donor = None if runner.has_failed else self._donor(instance, stage, assigned)
        if donor:
            inherit(runner, donor)
            self._forget(donor)
        return runner

    def _forget(self, runner: Runner) -> None:
        self.revision += 1
        self.former[runner.stage.runner_id] = self.runners.pop(runner.stage.runner_id)
        if len(self.former) > RUNNERS_REMEMBERED_MAX:
            self.former.pop(next(iter(self.former)))

    def _advance_one(self, now_ms: int, runner: Runner, world: World) -> list[Effect]:
        """At most two steps lie between what a runner is and what it should be: end, or begin, or go on."""
        late = overdue(now_ms, runner, self.settings.limits)
        if late:
            return self._end(now_ms, runner, late)
        others = neighbours(runner, world.reports)
        if self._must_stop(runner, others):
            return self._step(runner, Stop())
        if runner.state is RunnerState.FAILED and runner.retry_ms is not None and now_ms >= runner.retry_ms:
            self._step(runner, Retry(open_generation(runner, others)))
        if runner.state is RunnerState.IDLE and not runner.has_process:
            return self._begin(now_ms, runner, others, world)
        if self._is_over(now_ms, runner, others):
            return self._regroup(now_ms, runner, others, world)
        return self._go_on(runner, others, world)

    def _end(self, now_ms: int, runner: Runner, late: Overdue) -> list[Effect]:
        effects = self._step(runner, late)
        self._note(now_ms, runner)
        return effects

    def _go_on(self, runner: Runner, others: dict[int, Neighbour], world: World) -> list[Effect]:
        """To the next phase of its generation."""
        if runner.state is RunnerState.CONNECTING and runner.linked_to is None:
            return self._link(runner, others, world.reports)
        is_due = runner.state is RunnerState.CONNECTED or can_warm_up(runner, others)
        return self._step(runner, Proceed()) if is_due else []

    @staticmethod
    def _must_stop(runner: Runner, others: dict[int, Neighbour]) -> bool:
        if runner.state in (RunnerState.SHUTTING_DOWN, RunnerState.STUCK, RunnerState.SHUTDOWN):
            return False
        if not runner.wanted:
            return True
        if not runner.has_process or runner.state not in STARTED_STATES:
            return False
        return is_given_up(others)

    def _is_over(self, now_ms: int, runner: Runner, others: dict[int, Neighbour]) -> bool:
        """Whether the generation that its process takes part in is, or it takes part in none of this instance's."""
        if runner.state not in REGROUPED_STATES:
            return False
        is_behind = any(other.report.attempt > runner.attempt for other in others.values())
        is_due = runner.retry_ms is not None and now_ms >= runner.retry_ms and not has_failed(others)
        return runner.is_inherited or is_due or is_behind or self._lost_neighbour(runner, others)

    @staticmethod
    def _lost_neighbour(runner: Runner, others: dict[int, Neighbour]) -> bool:
        """Whether the node of a runner that we linked to was started anew since then."""
        return any(index in others and others[index].boot > boot for index, boot in runner.linked_to or ())

    def _begin(self, now_ms: int, runner: Runner, others: dict[int, Neighbour], world: World) -> list[Effect]:
        files = _files(runner, world.paths)
        last = runner.started_ms
        too_soon = last is not None and now_ms < last + self.settings.runner_spacing_ms
        if files is None or too_soon or not runner.is_seen_gone:
            return []
        if not self._has_room(runner, others, world) or is_given_up(others) or has_failed(others):
            return []
        attempt = open_generation(runner, others)
        return self._step(runner, Begin(attempt, self._spec(runner, files, attempt), now_ms))

    def _regroup(self, now_ms: int, runner: Runner, others: dict[int, Neighbour], world: World) -> list[Effect]:
        """Its process begins anew with what it holds. If there is no room for what it lacks, it ends instead."""
        files = _files(runner, world.paths)
        if files is None:
            return []
        if runner.holds != runner.stage.shard and world.memory_bytes_free is not None:
            lack = self._lack(runner, world.memory_bytes_free)
            if lack and (self.is_memory_moving or not world.is_memory_fresh):
                return []  # a later probe tells
            if lack:
                return self._step(runner, Stop())
        if runner.state not in SERVING_STATES:
            runner.heard_ms = now_ms  # only what serves has been beating
        attempt = open_generation(runner, others)
        effects = self._step(runner, Regroup(attempt, self._spec(runner, files, attempt)))
        self._note(now_ms, runner)  # whether it was well until now, before its time begins anew
        return effects

    def _has_room(self, runner: Runner, others: dict[int, Neighbour], world: World) -> bool:
        """Whether what is free and not promised to others here is enough; if it surely is not, `runner` waits."""
        if world.memory_bytes_free is None:
            return False
        lack = self._lack(runner, world.memory_bytes_free)
        if lack and (self.is_memory_moving or not world.is_memory_fresh):
            return False  # a later probe tells
        if lack and not runner.waiting:
            runner.attempt = open_generation(runner, others) + 1  # the others stop, and begin in this one with it
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
        own = 0 if runner.has_process else loading_bytes(runner.stage.memory_bytes)
        if own + promised <= free_bytes:
            return ""
        taken = f", {amount(promised)} of that promised to others," if promised else ","
        return f"has too little memory now: {amount(free_bytes)} free{taken} {amount(own)} needed"

    def _link(self, runner: Runner, others: dict[int, Neighbour], reports: dict[NodeId, NodeReport]) -> list[Effect]:
        """Once all stages listen: a link that waits for a stage whose file is still coming would run out of time."""
        stages = {**others, index_of(runner): Neighbour(self.boot, runner.report())}
        listening = [
            each for each in stages.values() if each.report.attempt == runner.attempt and each.report.data_address
        ]
        if len(listening) < len(runner.instance.stages):
            return []
        before, following, ranks = linked_runners(runner)
        boots = tuple((index, stages[index].boot) for index in sorted({*following, *ranks}))
        ways = [
            [self._ways(runner, stages, index, reports) for index in indices] for indices in (following, before, ranks)
        ]
        return self._step(runner, Link(boots, _only(ways[0]), _only(ways[1]), tuple(ways[2])))

    def _ways(
        self, runner: Runner, stages: dict[int, Neighbour], index: int, reports: dict[NodeId, NodeReport]
    ) -> tuple[Address, ...]:
        there = reports.get(runner.instance.stages[index].node_id)
        return ways_to(stages[index].report.data_address, there, reports.get(self.node_id))

    def _step(self, runner: Runner, news: object) -> list[Effect]:
        self.revision += 1
        return step(runner, news)

    def _spec(self, runner: Runner, files: Sequence[str], attempt: int) -> RunnerSpec:
        instance, index = runner.instance, index_of(runner)
        stage = stage_index(instance, index)
        return RunnerSpec(
            runner_id=runner.stage.runner_id,
            instance_id=instance.instance_id,
            generation=attempt,
            engine=instance.engine,
            engine_options=self.settings.engine_options | _engine_options(instance),
            model_path=files[0],
            draft=_draft(instance, files[1:]),
            vocabulary_size=instance.card.vocabulary_size,
            shard=runner.stage.shard,
            stage_index=stage,
            stage_count=stage_count(instance),
            stage_node_ids=tuple(each.node_id for each in leaders(instance)),
            rank=runner.stage.rank,
            rank_count=instance.rank_count,
            rank_node_ids=tuple(instance.stages[each].node_id for each in ranks_of(instance, stage)),
            context_length=instance.context_length,
            slot_count=instance.slot_count,
            thread_count=self.settings.thread_count,
            listen_host=self.settings.listen_host,
            connect_ms=self.settings.limits.connect_ms * 2 // 3,  # so that it can say who was not reached
        )


def _files(runner: Runner, paths: Mapping[ModelId, str]) -> list[str] | None:
    """Where the model's file lies, and at the head its draft's; None until all are there."""
    cards = cards_at(runner.instance, runner.stage)
    found = [paths[card.model_id] for card in cards if card.model_id in paths]
    return found if len(found) == len(cards) else None


def _draft(instance: Instance, files: Sequence[str]) -> Draft | None:
    card = instance.draft
    if not files or card is None:
        return None
    return Draft(model_path=files[0], layer_count=card.layer_count, vocabulary_size=card.vocabulary_size)


def _engine_options(instance: Instance) -> dict[str, str]:
    exact = {"exact": "1"} if instance.exact else {}
    quantize = {"quantize": instance.quantize.value} if instance.quantize else {}
    return exact | quantize | ({} if instance.kv_cache is KvCacheType.F32 else {"kv_cache": instance.kv_cache.value})


def _keep_time(now_ms: int, runner: Runner) -> None:
    """The time of a phase begins anew with each thing that the process, or we, have done."""
    loaded, answered = (runner.layers_loaded, runner.bytes_loaded), (runner.steps, runner.is_busy)
    progress = (runner.state, runner.attempt, runner.has_process, runner.linked_to, loaded, answered)
    if progress != runner.progress:
        runner.progress, runner.phase_since_ms, runner.progressed_ms = progress, now_ms, now_ms


def _only(ways: list[tuple[Address, ...]]) -> tuple[Address, ...]:
    return ways[0] if ways else ()
