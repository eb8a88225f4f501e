"""What goes into a node's control machine and what comes out: `handle(now_ms, input) -> list[Effect]`.

Each effect that asks for something is answered by inputs that carry its key and attempt; a stale answer is dropped.
`now_ms` is a clock that counts sleep, in whole milliseconds.
"""

from msgspec import Struct

from covey.schema.cluster import Command, CommandOutcome, Entry, Hardware, MeshMessage
from covey.schema.ids import ModelId, NodeId, RunnerId
from covey.schema.model import ModelCard
from covey.schema.runner import RunnerCommand, RunnerMessage, RunnerSpec

# ---- inputs ----


class Started(Struct, frozen=True, tag=True):
    """The first input of a life; effects begin only after it. `entries`: intent, as this node's disk has kept it."""

    entries: dict[str, Entry] = {}
    forget_until: int = 0  # deletions whose versions count up to this are old enough to be forgotten


class DeadlinePassed(Struct, frozen=True, tag=True):
    """Nothing happened until `deadline()`."""


class MessageReceived(Struct, frozen=True, tag=True):
    message: MeshMessage


class HardwareProbed(Struct, frozen=True, tag=True):
    """`resident_bytes`: what this node's runners hold, read at the same time, by process id."""

    hardware: Hardware
    resident_bytes: dict[int, int] = {}


class ModelsListed(Struct, frozen=True, tag=True):
    """Which listed or placed models lie complete on this node's disk."""

    model_ids: tuple[ModelId, ...]


class NetworkNoticed(Struct, frozen=True, tag=True):
    """What a person should know about the network now: one sentence each. The latest word counts."""

    notices: tuple[str, ...]


class CommandSubmitted(Struct, frozen=True, tag=True):
    """Somebody asked at this node. Answered by exactly one `AnswerCommand`."""

    command_id: str
    command: Command


class EntriesKept(Struct, frozen=True, tag=True):
    """They would outlive a power cut now."""

    token: int


class KeepingFailed(Struct, frozen=True, tag=True):
    """Nothing of it was written. `reason`: one sentence for a person."""

    token: int
    reason: str


class FetchProgressed(Struct, frozen=True, tag=True):
    model_id: ModelId
    attempt: int
    bytes_done: int
    bytes_total: int


class FetchFinished(Struct, frozen=True, tag=True):
    model_id: ModelId
    attempt: int
    path: str
    bytes_total: int


class FetchFailed(Struct, frozen=True, tag=True):
    model_id: ModelId
    attempt: int
    reason: str
    is_final: bool = False  # another try ends alike until a person does something about it
    is_damaged: bool = False  # and what came is of no use: another try fetches all of it again


class RunnerStarted(Struct, frozen=True, tag=True):
    runner_id: RunnerId
    attempt: int
    process_id: int


class RunnerSaid(Struct, frozen=True, tag=True):
    runner_id: RunnerId
    attempt: int
    message: RunnerMessage


class RunnerHalted(Struct, frozen=True, tag=True):
    """A signal (SIGSTOP) holds the process: it is there, and surely does nothing. Said again and again while it lasts.

    `seen_ms`: for how long, as far as it was looked at: the node's own sleep is no part of it.
    """

    runner_id: RunnerId
    attempt: int
    seen_ms: int


class RunnerExited(Struct, frozen=True, tag=True):
    """The process is gone and reaped, or could not be started. Always the last input of an attempt."""

    runner_id: RunnerId
    attempt: int
    description: str  # "exit status 1", "signal 9 (killed)", "could not be started: …"
    log_tail: str


class LeaveRequested(Struct, frozen=True, tag=True):
    """The node is to end: stop runners, then `Left` comes out."""


Input = (
    Started
    | DeadlinePassed
    | MessageReceived
    | HardwareProbed
    | ModelsListed
    | NetworkNoticed
    | CommandSubmitted
    | EntriesKept
    | KeepingFailed
    | FetchProgressed
    | FetchFinished
    | FetchFailed
    | RunnerStarted
    | RunnerSaid
    | RunnerHalted
    | RunnerExited
    | LeaveRequested
)

# ---- effects ----


class Publish(Struct, frozen=True, tag=True):
    """To every node that can be reached. May be lost, doubled or late."""

    message: MeshMessage


class SendTo(Struct, frozen=True, tag=True):
    """To one node. May be lost, doubled or late."""

    target: NodeId
    message: MeshMessage


class AnswerCommand(Struct, frozen=True, tag=True):
    command_id: str
    outcome: CommandOutcome


class KeepEntries(Struct, frozen=True, tag=True):
    """Write all of it to this node's disk or nothing; None: drop the key. Answered by `EntriesKept` or `KeepingFailed`.

    The next one comes only after the answer, so they are written in order.
    """

    entries: dict[str, Entry | None]
    token: int


class StartFetch(Struct, frozen=True, tag=True):
    """Make the model's file present (at once if it is). Answered by `FetchFinished` or `FetchFailed`."""

    card: ModelCard
    attempt: int


class CancelFetch(Struct, frozen=True, tag=True):
    """Not answered; a fetch that is not running is no error."""

    model_id: ModelId
    attempt: int


class StartRunner(Struct, frozen=True, tag=True):
    """Start the process and send it `Configure`. `RunnerStarted`, then `RunnerSaid` ..., then `RunnerExited`."""

    runner_id: RunnerId
    attempt: int
    spec: RunnerSpec


class RegroupRunner(Struct, frozen=True, tag=True):
    """Send `Configure` to a process that has been started as this attempt of this runner. `RunnerSaid` ... go on."""

    runner_id: RunnerId
    attempt: int
    spec: RunnerSpec


class TellRunner(Struct, frozen=True, tag=True):
    runner_id: RunnerId
    attempt: int
    command: RunnerCommand


class StopRunner(Struct, frozen=True, tag=True):
    """Ask it to shut down, SIGTERM after `grace_ms`, SIGKILL as long again after that. Answered by `RunnerExited`.

    One that hangs is not asked first: SIGTERM at once.
    """

    runner_id: RunnerId
    attempt: int
    grace_ms: int
    asks_first: bool = True


class StateChanged(Struct, frozen=True, tag=True):
    """The snapshot (`Machine.state()`) differs from the last one in something that a client could see."""


class Left(Struct, frozen=True, tag=True):
    """Nothing is left running; the driver may end. `reason`: one sentence, where nobody asked the node to leave."""

    reason: str = ""


Effect = (
    Publish
    | SendTo
    | AnswerCommand
    | KeepEntries
    | StartFetch
    | CancelFetch
    | StartRunner
    | RegroupRunner
    | TellRunner
    | StopRunner
    | StateChanged
    | Left
)
