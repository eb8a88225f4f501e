"""What happened, a line at a time, for reading."""

from __future__ import annotations

from collections.abc import Callable

from covey.schema.cluster import (
    Accepted,
    AddKey,
    CommandAnswer,
    CommandOutcome,
    CommandRequest,
    DeleteInstance,
    Heartbeat,
    IntentKept,
    IntentUpdate,
    MeshMessage,
    NodeReport,
    PlaceModel,
    Rebalance,
    Refused,
    RevokeKey,
)
from covey.schema.machine import (
    AnswerCommand,
    CommandSubmitted,
    DeadlinePassed,
    Effect,
    EntriesKept,
    FetchFailed,
    FetchFinished,
    FetchProgressed,
    HardwareProbed,
    Input,
    KeepEntries,
    MessageReceived,
    Publish,
    RegroupRunner,
    RunnerExited,
    RunnerHalted,
    RunnerSaid,
    SendTo,
    Started,
    StartFetch,
    StartRunner,
    StateChanged,
    StopRunner,
    TellRunner,
)
from covey.schema.model import KvCacheType
from covey.schema.runner import Beat, RunnerSpec
from simulation.host import Host
from simulation.world import World


class Trace:
    """Follows a world and writes what a reader wants to know: no heartbeats, no clock ticks, no plain reports."""

    def __init__(self, world: World, write: Callable[[str], None]) -> None:
        self.world = world
        self.write = write
        self.leaders: dict[str, str] = {}
        self.seen: dict[str, str] = {}
        world.observer = self.observe

    def observe(self, host: Host | None, news: Input | str, effects: list[Effect]) -> None:
        if host is None:
            self._line("world", str(news))
            return
        said = self._input(news)
        if said:
            self._line(host.name, f"< {said}")
        for effect in effects:
            done = self._effect(effect)
            if done:
                self._line(host.name, f"> {done}")
        self._changes(host)

    def _line(self, who: str, what: str) -> None:
        self.write(f"{self.world.now_ms / 1000:8.3f} {who:6} {what}")

    def _changes(self, host: Host) -> None:
        """Whom it follows and whom it sees, when that changes."""
        if host.machine is None:
            return
        state = host.machine.state(host.now_ms)
        leader = self._name(state.leader) if state.leader else "nobody"
        sees = ", ".join(f"{self._name(each.node_id)} {each.visibility}" for each in state.members)
        for memory, word, value in ((self.seen, "sees", sees), (self.leaders, "follows", leader)):
            if memory.get(host.name) != value:
                memory[host.name] = value
                self._line(host.name, f"{word} {value}")

    def _input(self, news: Input | str) -> str | None:
        match news:
            case DeadlinePassed() | HardwareProbed() | FetchProgressed() | EntriesKept():
                said = None
            case Started(entries):
                said = f"Started with {', '.join(entries) or 'nothing'} on its disk"
            case MessageReceived(message):
                said = self._message("from", message)
            case CommandSubmitted(command_id):
                said = f"{command_id}: {_command(news)}"
            case RunnerSaid(message=Beat()) | RunnerHalted():
                said = None
            case RunnerSaid(runner_id, attempt, message):
                said = f"{runner_id} attempt {attempt} says {message}"
            case RunnerExited(runner_id, attempt, description):
                said = f"{runner_id} attempt {attempt} ended: {description}"
            case FetchFinished(model_id, attempt) | FetchFailed(model_id, attempt):
                said = f"{type(news).__name__} {model_id} attempt {attempt}"
            case _:
                said = str(news)
        return said

    def _effect(self, effect: Effect) -> str | None:
        match effect:
            case StateChanged() | KeepEntries():
                done = None
            case Publish(message):
                done = self._message("to all:", message)
            case SendTo(target, message):
                done = self._message(f"to {self._name(target)}:", message)
            case AnswerCommand(command_id, outcome):
                done = f"{command_id} is answered: {_outcome(outcome)}"
            case StartRunner(runner_id, attempt, spec):
                done = f"start {runner_id} attempt {attempt}, {_held(spec)}"
            case RegroupRunner(runner_id, attempt, spec):
                done = f"regroup {runner_id} attempt {attempt} as {spec.runner_id} in {spec.generation}, {_held(spec)}"
            case StopRunner(runner_id, attempt):
                done = f"stop {runner_id} attempt {attempt}"
            case TellRunner(runner_id, attempt, command):
                done = f"tell {runner_id} attempt {attempt}: {command}"
            case StartFetch(card, attempt):
                done = f"fetch {card.model_id} attempt {attempt}"
            case _:
                done = str(effect)
        return done

    def _message(self, way: str, message: MeshMessage) -> str | None:
        if isinstance(message, Heartbeat | NodeReport):
            return None
        if isinstance(message, IntentUpdate):
            keys = [f"{key}{'' if entry.value else ' (deleted)'}" for key, entry in message.entries.items()]
            sender = f" {self._name(message.node_id)}:" if way == "from" else ""
            return f"{way}{sender} intent {', '.join(keys)}"
        if isinstance(message, IntentKept):
            return None if way == "from" else f"{way} that is on this disk too"
        if isinstance(message, CommandRequest):
            return f"{way} request {message.command_id} of {self._name(message.origin)}"
        return f"{way} answer to {_answer(message)}"

    def _name(self, node_id: str) -> str:
        return self.world.host(node_id).name


def _held(spec: RunnerSpec) -> str:
    """What it is to load."""
    shard = spec.shard
    draft = f", and the {spec.draft.layer_count} of its draft" if spec.draft else ""
    cache = f", keys and values in {spec.engine_options['kv_cache']}" if "kv_cache" in spec.engine_options else ""
    return f"layers {shard.layer_start} to {shard.layer_end} of {shard.layer_count}{draft}{cache}"


def _command(news: CommandSubmitted) -> str:
    match news.command:
        case PlaceModel(card=card, node_count_min=node_count_min, rank_count=rank_count, draft=draft, kv_cache=kind):
            shared = f", each layer shared by {rank_count}" if rank_count > 1 else ""
            guessed = f", with {draft.model_id} as its draft" if draft else ""
            cached = "" if kind is KvCacheType.F32 else f", with a KV cache in {kind}"
            return f"place {card.model_id} on at least {node_count_min}{shared}{guessed}{cached}"
        case Rebalance(instance_id):
            return f"rebalance {instance_id}"
        case DeleteInstance(instance_id):
            return f"delete {instance_id}"
        case AddKey(key):
            return f"add a key for {key.name}"
        case RevokeKey(key):
            return f"revoke {key}"


def _answer(answer: CommandAnswer) -> str:
    return f"{answer.command_id}: {_outcome(answer.outcome)}"


def _outcome(outcome: CommandOutcome) -> str:
    if isinstance(outcome, Accepted):
        return f"accepted, {outcome.effect_id}" + (" on one node only" if outcome.on_one_node_only else "")
    if isinstance(outcome, Refused):
        return f"refused ({outcome.status}), {outcome.reason}"
    return f"timed out after {outcome.waited_ms} ms"
