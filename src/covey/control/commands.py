"""Commands: from the node where somebody asked, to the leader, and the outcome back, exactly once.

`Asking` is the side of the node that was asked: it repeats the request until an outcome comes or time is up.
`Answering` is the leader's memory of what it has answered, so that a repeated request is answered alike and carried
out once.
"""

from collections.abc import Container

from msgspec import Struct

from covey.control.settings import COMMANDS_REMEMBERED_MAX, MachineSettings
from covey.schema.cluster import Command, CommandOutcome, CommandRequest, Refused, TimedOut
from covey.schema.ids import NodeId
from covey.schema.machine import AnswerCommand, Effect


class Pending(Struct):
    """One command that somebody at this node waits for."""

    command_id: str
    command: Command
    submitted_ms: int
    retry_ms: int


class Asking:
    """Commands submitted here and not answered yet."""

    def __init__(self, node_id: NodeId, settings: MachineSettings) -> None:
        self.node_id = node_id
        self.settings = settings
        self.pending: dict[str, Pending] = {}

    def submit(self, now_ms: int, command_id: str, command: Command) -> None:
        """The same id again, while it is pending, is the same command."""
        self.pending.setdefault(command_id, Pending(command_id, command, now_ms, now_ms))

    def answer(self, command_id: str, outcome: CommandOutcome) -> list[Effect]:
        """To whoever asked, unless that has been done."""
        if self.pending.pop(command_id, None) is None:
            return []
        return [AnswerCommand(command_id, outcome)]

    def expire(self, now_ms: int) -> list[Effect]:
        """Gives up on what has waited too long."""
        limit = self.settings.command_timeout_ms
        late = [each.command_id for each in self.pending.values() if now_ms - each.submitted_ms >= limit]
        return [effect for command_id in late for effect in self.answer(command_id, TimedOut(limit))]

    def refuse_all(self, reason: str, besides: Container[str] = ()) -> list[Effect]:
        """The node ends; nobody is left without an answer. `besides`: commands whose answers are on their way."""
        refused = [command_id for command_id in self.pending if command_id not in besides]
        return [effect for each in refused for effect in self.answer(each, Refused(reason, 503))]

    def due(self, now_ms: int) -> list[CommandRequest]:
        """The requests to make now; each is due again after a while."""
        requests: list[CommandRequest] = []
        for pending in self.pending.values():
            if now_ms >= pending.retry_ms:
                pending.retry_ms = now_ms + self.settings.command_retry_ms
                requests.append(CommandRequest(pending.command_id, self.node_id, pending.command))
        return requests

    def hasten(self, now_ms: int) -> None:
        """There is a new leader: ask it at once."""
        for pending in self.pending.values():
            pending.retry_ms = now_ms

    def deadline(self) -> int | None:
        limit = self.settings.command_timeout_ms
        times = [min(each.submitted_ms + limit, each.retry_ms) for each in self.pending.values()]
        return min(times, default=None)


class Answering:
    """What this node answered as leader, the latest `COMMANDS_REMEMBERED_MAX`."""

    def __init__(self) -> None:
        self.outcomes: dict[str, CommandOutcome] = {}

    def remember(self, command_id: str, outcome: CommandOutcome) -> None:
        self.outcomes[command_id] = outcome
        if len(self.outcomes) > COMMANDS_REMEMBERED_MAX:
            self.outcomes.pop(next(iter(self.outcomes)))
