"""What must be true some time after faults have stopped; a sentence says what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from covey.control.placement.again import place_at_all
from covey.control.routing import instance_status, nodes_of, options_of
from covey.schema.cluster import (
    Accepted,
    ClusterState,
    Instance,
    InstancePhase,
    Refused,
    Visibility,
    Wish,
)
from covey.schema.pipeline import cards_needed
from simulation.people import is_creation, lasting

if TYPE_CHECKING:
    from covey.control.machine import Machine
    from simulation.host import Host
    from simulation.world import World


def missing(world: World) -> str | None:
    """The first thing that is not as it should be; None if all is well."""
    return next(_all_missing(world), None)


def _all_missing(world: World) -> Iterator[str]:
    machines = [(host, host.machine) for host in world.up() if host.machine]
    if not machines:
        return
    yield from _members(world, machines)
    yield from _agreement(machines)
    states = [machine.state(host.now_ms) for host, machine in machines]
    for (host, machine), state in zip(machines, states, strict=True):
        yield from _nothing_lost(world, host, machine)
        yield from _on_disk(host, machine)
        yield from _nothing_extra(host, state, machine)
    for wish in states[0].wishes:
        yield from _served(world, wish, states)
    yield from _kept_promises(world)
    if world.people.waiting():
        yield f"commands {world.people.waiting()} have no answer"


def _members(world: World, machines: list[tuple[Host, Machine]]) -> Iterator[str]:
    up = sorted(host.node_id for host in world.up())
    for host, machine in machines:
        members = machine.state(host.now_ms).members
        if [member.node_id for member in members] != up:
            yield f"{host.name} knows {len(members)} nodes, {len(up)} are up"
        for member in members:
            if member.visibility is not Visibility.VISIBLE:
                yield f"{host.name} does not see {world.host(member.node_id).name}"


def _agreement(machines: list[tuple[Host, Machine]]) -> Iterator[str]:
    first, first_machine = machines[0]
    for host, machine in machines:
        if machine.leadership.leader is None:
            yield f"{host.name} follows nobody"
        if machine.leadership.leader != first_machine.leadership.leader:
            yield f"{host.name} and {first.name} follow different leaders"
        if machine.cluster.entries != first_machine.cluster.entries:
            yield f"{host.name} and {first.name} hold different maps"
        if machine.cluster.digest != first_machine.cluster.digest:
            yield f"{host.name} and {first.name} hold equal maps with different digests"


def _nothing_lost(world: World, host: Host, machine: Machine) -> Iterator[str]:
    sentence = world.ledger.lost(host, machine.cluster.entries)
    if sentence:
        yield sentence


def _on_disk(host: Host, machine: Machine) -> Iterator[str]:
    """The disk holds the map, and nothing beside it."""
    if host.disk.under_way or host.disk.entries != machine.cluster.entries:
        yield f"the disk of {host.name} does not hold its map"


def _kept_promises(world: World) -> Iterator[str]:
    """What was accepted is there, or somebody asked for its end; an accepted end is one. (Unless its disks broke.)"""
    if world.forgets:
        return
    for command_id, outcome in world.people.answers.items():
        if not isinstance(outcome, Accepted):
            continue
        command = world.people.asked[command_id]
        key, creates = lasting(command, outcome), is_creation(command)
        if key in world.ledger.lost_with_disk:
            continue
        entries = [host.disk.entries[key] for host in world.hosts if key in host.disk.entries]
        if creates and not entries:
            yield f"command {command_id} was accepted, and {key} is on no disk"
        if creates and key not in world.people.ended and any(entry.value is None for entry in entries):
            yield f"{key} was accepted and is gone, though nobody deleted it"
        if not creates and entries and max(entries, key=lambda entry: entry.version).value is not None:
            yield f"{key} was deleted, and is there on every disk"


def _nothing_extra(host: Host, state: ClusterState, machine: Machine) -> Iterator[str]:
    """No process and no record of a runner that is not assigned."""
    stages = [stage for instance in state.instances for stage in instance.stages]
    assigned = [stage.runner_id for stage in stages if stage.node_id == host.node_id]
    for runner_id in [*(process.spec.runner_id for process in host.processes), *machine.runners.runners]:
        if runner_id not in assigned:
            yield f"{host.name} still runs {runner_id}"
    ending = [process.spec.runner_id for process in host.processes if process.was_asked_to_stop]
    yield from (f"{host.name} waits for the end of {runner_id}" for runner_id in ending)  # then another may start
    needed = cards_needed(state.instances, host.node_id)
    yield from (f"{host.name} still fetches {model_id}" for model_id in host.fetches if model_id not in needed)


def _served(world: World, wish: Wish, states: list[ClusterState]) -> Iterator[str]:
    instances = [each for each in states[0].instances if each.wish_id == wish.wish_id]
    if len(instances) > 1:
        yield f"{wish.wish_id} has {len(instances)} instances"
    if not instances:
        yield from _must_not_fit(wish, states[0])
    for instance in instances:
        if any(not world.host(stage.node_id).is_up for stage in instance.stages):
            yield from _must_not_fit(wish, states[0])  # it waits for a node that may never come back
            continue
        for state in states:
            status = instance_status(state, instance)
            if status.phase is InstancePhase.FAILED and _used_up(world, instance):
                yield from _stopped(world, instance)
                continue
            if _lacks_memory(world, instance):
                yield from _stopped(world, instance)
                yield from _must_not_fit(wish, state)
                continue
            if status.phase is not InstancePhase.READY:
                yield f"{instance.instance_id} is not ready but {status.text.splitlines()[0]}"
        yield from _linked(world, instance)


def _must_not_fit(wish: Wish, state: ClusterState) -> Iterator[str]:
    nodes = nodes_of(state, [each for each in state.instances if each.wish_id == wish.wish_id])
    if not isinstance(place_at_all(wish.card, nodes, options_of(wish, nodes)), Refused):
        yield f"{wish.wish_id} fits, but is not assigned"


def _used_up(world: World, instance: Instance) -> bool:
    """Whether one of its runners has failed as often as it may."""
    budget = len(world.settings.runner_back_off_ms)
    return any(
        len(world.host(stage.node_id).safety.failures.get(stage.runner_id, [])) > budget for stage in instance.stages
    )


def _lacks_memory(world: World, instance: Instance) -> bool:
    """Whether one of its runners waits for memory that is not there."""
    hosts = [(world.host(stage.node_id), stage) for stage in instance.stages]
    return any(stage.runner_id in host.safety.lacking and not host.fits(stage) for host, stage in hosts)


def _stopped(world: World, instance: Instance) -> Iterator[str]:
    """What has failed for good, or waits for memory, takes none."""
    for host in world.up():
        for process in host.processes:
            if process.spec.instance_id == instance.instance_id:
                yield f"{instance.instance_id} can't run, and yet {process.spec.runner_id} runs"


def _linked(world: World, instance: Instance) -> Iterator[str]:
    """Of the processes of a ready instance the first ranks form one ring, and those of a stage know one another."""
    processes = [
        process
        for stage in instance.stages
        for process in world.host(stage.node_id).processes
        if process.spec.runner_id == stage.runner_id
    ]
    yield from (f"{process.spec.runner_id} hangs, and is left alone" for process in processes if process.has_stalled)
    if len(processes) != len(instance.stages):
        return
    ranks = instance.rank_count
    for index, process in enumerate(processes):
        following = processes[(index + ranks) % len(processes)]
        if process.spec.rank == 0 and process.linked_to is not following:
            yield f"stage {index // ranks} of {instance.instance_id} is not linked to the next one"
        start = index // ranks * ranks
        others = {rank: processes[start + rank] for rank in range(ranks) if start + rank != index}
        if process.ranks != others:
            yield f"{process.spec.runner_id} is not linked to the other ranks of its stage"
