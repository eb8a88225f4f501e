"""What must hold after every step (safety), and what must come true once the faults have stopped (liveness)."""

from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING

from covey.schema.cluster import (
    Accepted,
    ClusterState,
    CommandOutcome,
    Instance,
    PlaceModel,
    Visibility,
)
from covey.schema.ids import InstanceId, NodeId
from covey.schema.machine import Effect, Left, StartFetch, StartRunner
from covey.schema.runner import RunnerState

if TYPE_CHECKING:
    from simulation.world import Node, World

ANSWER_MS_MAX = 11_000  # the command's time-out and a second
STARTS_WINDOW_MS = 10_000
STARTS_MAX = 11  # one a second is the most that the spacing allows
FETCHES_MAX = 6


class BrokenPromiseError(AssertionError):
    """A check failed. The message is one sentence that says what is wrong, and where."""


def promise(holds: object, sentence: str) -> None:
    if not holds:
        raise BrokenPromiseError(sentence)


class Checks:
    """Looks at each step. It remembers what it needs to compare with, nothing else."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.instances_seen: dict[InstanceId, Instance] = {}
        self._heard: dict[tuple[NodeId, int, NodeId], tuple[int, int]] = {}
        self._revision: dict[tuple[NodeId, int], int] = {}
        self._recent: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self._answered: set[str] = set()

    def note_instances(self, state: ClusterState) -> None:
        """Before anything else in a step: what was decided is whole, and never changes."""
        for instance in state.instances:
            if instance.instance_id not in self.instances_seen:
                self._is_whole(instance)
                self.instances_seen[instance.instance_id] = instance
            promise(instance == self.instances_seen[instance.instance_id], f"{instance.instance_id} changed")

    # ---- at each effect ----

    def before_effect(self, node: "Node", effect: Effect, state: ClusterState) -> None:
        match effect:
            case StartRunner(runner_id, _, spec):
                self._may_start(node, runner_id, spec.instance_id, state)
            case StartFetch(card, _):
                promise(card.model_id not in node.fetches, f"{node.node_id} fetches {card.model_id} twice at once")
                self._not_too_often(("fetch", node.node_id, card.model_id), FETCHES_MAX)
            case Left():
                promise(not node.processes, f"{node.node_id} left with {len(node.processes)} runners")
            case _:
                pass

    def _may_start(self, node: "Node", runner_id: str, instance_id: str, state: ClusterState) -> None:
        assigned = {
            stage.runner_id
            for instance in state.instances
            if instance.instance_id == instance_id
            for stage in instance.stages
            if stage.node_id == node.node_id
        }
        promise(runner_id in assigned, f"{node.node_id} starts {runner_id}, which is not assigned to it")
        running = {process.runner_id for process in node.processes.values() if process.alive}
        promise(runner_id not in running, f"{node.node_id} starts {runner_id} while it runs")
        self._not_too_often(("runner", node.node_id, runner_id), STARTS_MAX)

    def _not_too_often(self, key: tuple[str, ...], most: int) -> None:
        now = self.world.now
        times = self._recent[key] = [t for t in self._recent[key] if t > now - STARTS_WINDOW_MS] + [now]
        promise(len(times) <= most, f"{key} {len(times)} times within {STARTS_WINDOW_MS} ms")

    # ---- at each answer ----

    def answer(self, node: "Node", command_id: str, outcome: CommandOutcome) -> None:
        promise(command_id not in self._answered, f"{command_id} is answered twice")
        self._answered.add(command_id)
        origin, boot, _, command = self.world.people.asked[command_id]
        promise((origin, boot) == (node.node_id, node.boot), f"{command_id} is answered at another node")
        if isinstance(outcome, Accepted) and isinstance(command, PlaceModel):
            instance = self.instances_seen.get(outcome.instance_id)
            promise(instance is not None, f"{command_id} was accepted, but no node ever held {outcome.instance_id}")
            assert instance is not None
            promise(instance.card.model_id == command.card.model_id, f"{command_id} got another model")

    # ---- after each step ----

    def after_step(self, node: "Node", state: ClusterState) -> None:
        self._commands_are_answered(node)
        key = (node.node_id, node.boot)
        promise(state.revision >= self._revision.get(key, 0), f"{node.node_id}'s revision went back")
        self._revision[key] = state.revision
        promise(any(m.node_id == node.node_id for m in state.members), f"{node.node_id} does not list itself")
        for member in state.members:
            if member.report is not None:
                heard = (member.report.boot, member.report.sequence)
                place = (node.node_id, node.boot, member.node_id)
                promise(
                    heard >= self._heard.get(place, (0, 0)), f"{node.node_id} took an old report of {member.node_id}"
                )
                self._heard[place] = heard

    def _commands_are_answered(self, node: "Node") -> None:
        now = self.world.now
        for command_id, (origin, boot, asked_at, _) in self.world.people.asked.items():
            if (origin, boot) == (node.node_id, node.boot) and now > asked_at + ANSWER_MS_MAX:
                promise(command_id in self._answered, f"{command_id} has no answer after {now - asked_at} ms")

    def _is_whole(self, instance: Instance) -> None:
        ends = [0, *(stage.shard.layer_end for stage in instance.stages)]
        starts = [*(stage.shard.layer_start for stage in instance.stages), instance.card.layer_count]
        promise(ends == starts, f"{instance.instance_id}'s layers have gaps: {starts}")
        promise(all(a < b for a, b in pairwise(ends)), f"{instance.instance_id} has an empty stage")
        nodes = [stage.node_id for stage in instance.stages]
        promise(len(set(nodes)) == len(nodes), f"{instance.instance_id} has two stages on one node")
        for stage in instance.stages:
            weights = sum(instance.card.layer_bytes[stage.shard.layer_start : stage.shard.layer_end])
            memory = self.world.nodes[stage.node_id].memory_bytes
            promise(weights < stage.memory_bytes <= memory, f"{stage.node_id} can't hold its stage")

    # ---- when the faults have stopped ----

    def all_is_well(self) -> None:
        """Raises `BrokenPromiseError` with the first thing that is missing."""
        states = self.world.states()
        self._all_see_each_other(states)
        self._one_intent(states)
        self._instances_are_settled(states)
        self._only_what_is_assigned_runs(states)
        self._wishes_that_fit_are_placed(states)

    def _all_see_each_other(self, states: dict[NodeId, ClusterState]) -> None:
        for node_id, state in states.items():
            seen = [m.node_id for m in state.members if m.visibility == Visibility.VISIBLE and m.report is not None]
            promise(seen == sorted(states), f"{node_id} sees {seen}, not {sorted(states)}")
            promise(len(state.members) == len(states), f"{node_id} still remembers nodes that are gone")
        leaders = {state.leader for state in states.values()}
        promise(len(leaders) == 1 and leaders <= set(states), f"the leaders are {sorted(map(str, leaders))}")

    def _one_intent(self, states: dict[NodeId, ClusterState]) -> None:
        views = {(repr(state.wishes), repr(state.instances)) for state in states.values()}
        promise(len(views) <= 1, "the nodes hold different intent")
        for state in states.values():
            left = {i.instance_id for i in state.instances} & self.world.people.deleted
            promise(not left, f"{sorted(left)} were deleted, and are back")

    def _instances_are_settled(self, states: dict[NodeId, ClusterState]) -> None:
        """Every runner is ready; or its instance has failed, where processes were made to fail."""
        for state in states.values():
            reports = {r.runner_id: r for m in state.members if m.report for r in m.report.runners}
            for instance in state.instances:
                for stage in instance.stages:
                    promise(stage.node_id in states, f"{instance.instance_id} has a stage on a node that is gone")
                    promise(stage.runner_id in reports, f"{state.node_id} has no report of {stage.runner_id}")
                found = [reports[stage.runner_id].state for stage in instance.stages]
                ready = all(s in {RunnerState.READY, RunnerState.RUNNING} for s in found)
                given_up = RunnerState.FAILED in found and self.world.faults.runner_exit_percent > 0
                promise(ready or given_up, f"{instance.instance_id} is stuck: {[s.value for s in found]}")

    def _only_what_is_assigned_runs(self, states: dict[NodeId, ClusterState]) -> None:
        assigned = {s.runner_id for state in states.values() for i in state.instances for s in i.stages}
        for process in self.world.processes():
            promise(process.runner_id in assigned, f"{process.runner_id} runs, but nothing assigns it")

    def _wishes_that_fit_are_placed(self, states: dict[NodeId, ClusterState]) -> None:
        for state in states.values():
            served = {instance.wish_id for instance in state.instances}
            for wish in state.wishes:
                must = wish.card.model_id == "small" and wish.node_count_min <= len(states)
                crowded = len(state.wishes) > 1  # then memory may be taken
                promise(wish.wish_id in served or not must or crowded, f"{wish.wish_id} fits, but is not served")
