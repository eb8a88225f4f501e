"""What a node and its runner processes say to one another, over the runner's standard input and output.

The node sends `Configure` first; the runner opens its data port and answers `Listening`. Then each command moves it
one phase on: `ConnectTo` (ends in `Connected`), `Load` (`LoadProgressed` ..., `Loaded`), `WarmUp` (`Ready`),
`ShutDown` (the process ends). While it serves it sends `Beat`, and the head `Activity`. Any phase can end in
`PhaseFailed`, after which the process ends by itself.

A process that has loaded outlives the loss of a link: it says `Parted`, keeps its weights, and waits. `Configure` may
come again at any time: the process drops its links and requests, and begins anew with `Listening`; at `Load` it then
reads only what it lacks.
The end of standard input means that the node is gone, and ends the runner too.
"""

from enum import StrEnum
from typing import Final

from msgspec import Struct

from covey.schema.ids import NodeId, RunnerId
from covey.schema.model import Shard
from covey.schema.trust import Credentials

EVERYWHERE: Final = "::"  # as the host to listen at; where there is no IPv6, all of IPv4
BEAT_MS: Final = 2_000  # between two beats


class RunnerState(StrEnum):
    """The states of a runner, with the names that exo's clients know."""

    IDLE = "Idle"  # assigned; waiting for its model file or its process
    CONNECTING = "Connecting"
    CONNECTED = "Connected"
    LOADING = "Loading"
    LOADED = "Loaded"
    WARMING_UP = "WarmingUp"
    READY = "Ready"
    RUNNING = "Running"
    SHUTTING_DOWN = "ShuttingDown"
    STUCK = "Stuck"  # killed, and yet its process is still there: its memory stays taken (no state of exo's)
    PARTED = "Parted"  # its weights are here, a link is not: it waits for the next generation (no state of exo's)
    FAILED = "Failed"
    SHUTDOWN = "Shutdown"


class Address(Struct, frozen=True):
    """Where a TCP listener is reached."""

    host: str
    port: int


class Draft(Struct, frozen=True, kw_only=True):
    """A smaller model with the same vocabulary, which a head holds whole beside its stage to guess what comes next."""

    model_path: str
    layer_count: int
    vocabulary_size: int = 0  # rows of its embedding: ids beyond it can't be read; 0: unknown


class RunnerSpec(Struct, frozen=True, kw_only=True):
    """What one runner process is to be. `generation` counts how often its instance has begun anew: only stages of the
    same one link.
    """

    runner_id: RunnerId
    instance_id: str
    engine: str  # "onnx" | "fake"
    engine_options: dict[str, str] = {}
    model_path: str
    shard: Shard
    stage_index: int
    stage_count: int
    stage_node_ids: tuple[NodeId, ...]  # whose runner each stage is: links are taken from them alone
    context_length: int  # tokens in one KV slot
    slot_count: int  # requests that run at once
    thread_count: int
    listen_host: str  # the data port listens here; `EVERYWHERE`: at all addresses that are not the internet's
    connect_ms: int  # to reach the neighbours, who start at the same time, on machines that may be slow
    generation: int = 0
    vocabulary_size: int = 0  # the head refuses prompts with token ids beyond it; 0: unknown
    rank: int = 0  # which share of every matrix of its layers it has
    rank_count: int = 1
    rank_node_ids: tuple[NodeId, ...] = ()  # whose runner each rank of this stage is
    draft: Draft | None = None  # for the head alone


class Configure(Struct, frozen=True, tag=True):
    """`credentials` are the node's: they reach a runner only by this line, never by its arguments or environment."""

    spec: RunnerSpec
    credentials: Credentials


class ConnectTo(Struct, frozen=True, tag=True):
    """Open the link to the next stage; the last stage's next is the head. Alone, a stage is given itself.

    Addresses are in the order to be tried; those of the stage before are for a link that it can't open itself. Only
    rank 0 of a stage is linked to other stages. All ranks are linked to the other ranks of their stage.
    """

    next_stage: tuple[Address, ...]
    stage_before: tuple[Address, ...] = ()
    ranks: tuple[tuple[Address, ...], ...] = ()  # of each rank of this stage, in order of rank


class Load(Struct, frozen=True, tag=True):
    pass


class WarmUp(Struct, frozen=True, tag=True):
    pass


class ShutDown(Struct, frozen=True, tag=True):
    pass


RunnerCommand = Configure | ConnectTo | Load | WarmUp | ShutDown


class Listening(Struct, frozen=True, tag=True):
    """The data port is open: for the link from the stage before, and on the head for requests."""

    port: int


class Connected(Struct, frozen=True, tag=True):
    """Both neighbours are linked (the next was reached, the one before has come)."""


class LoadProgressed(Struct, frozen=True, tag=True):
    layers_loaded: int
    layers_total: int
    bytes_loaded: int
    bytes_total: int


class Loaded(Struct, frozen=True, tag=True):
    resident_bytes: int


class Ready(Struct, frozen=True, tag=True):
    pass


class Activity(Struct, frozen=True, tag=True):
    """How many requests the head has; sent when it becomes busy or idle again and at most twice a second between."""

    running: int
    queued: int


class Beat(Struct, frozen=True, tag=True):
    """While it serves, every `BEAT_MS`, from a thread that computing does not hold up."""

    steps: int  # that have ended; the head counts those that came back from the last stage
    is_busy: bool  # one is under way; the head: a request is
    waits_for_others: bool = False  # what is under way: it has done its part, as far as it can


class Parted(Struct, frozen=True, tag=True):
    """A link was lost or never came to be; what is loaded stays. `reason` is one sentence for a person."""

    reason: str


class PhaseFailed(Struct, frozen=True, tag=True):
    """A phase ended badly; `reason` is one sentence for a person."""

    phase: str
    reason: str


RunnerMessage = Listening | Connected | LoadProgressed | Loaded | Ready | Activity | Beat | Parted | PhaseFailed
