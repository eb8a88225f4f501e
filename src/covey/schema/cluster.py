"""The state of a cluster: intent (what people asked for, what the leader assigned) and reports (what each node says).

Intent is a map of key -> `Entry` that every node holds; merging keeps the higher version per key. A report is a
node's own word about itself: the latest wins, it is never stored, and it vanishes with its node.
"""

from enum import StrEnum
from typing import Final

from msgspec import Struct

from covey.schema.ids import InstanceId, ModelId, NodeId, RunnerId
from covey.schema.model import KvCacheType, ModelCard, Quantizing, Shard
from covey.schema.runner import Address, RunnerState

# ---- intent ----


class Version(Struct, frozen=True, order=True):
    """Which write of a key is newer: the higher counter, then the higher writer."""

    counter: int
    writer: NodeId


class Stage(Struct, frozen=True):
    """One runner of an instance. `memory_bytes` is what placement counted for it: weights, KV cache and overhead."""

    runner_id: RunnerId
    node_id: NodeId
    shard: Shard
    memory_bytes: int
    node_name: str = ""  # as it was when the stage was assigned, for people who wait for that node
    rank: int = 0  # of those that share these layers; rank 0 speaks for them


class Wish(Struct, frozen=True, tag="wish", kw_only=True):
    """What a person asked for: serve this model."""

    wish_id: str
    card: ModelCard
    node_count_min: int
    context_length: int  # tokens of one KV slot
    slot_count: int
    node_ids: tuple[NodeId, ...] = ()  # the nodes that may serve it; empty: any
    exact: bool = False
    quantize: Quantizing | None = None
    rank_count: int = 1  # how many runners share each layer
    draft: ModelCard | None = None  # the head guesses with it
    kv_cache: KvCacheType = KvCacheType.F32


class Instance(Struct, frozen=True, tag="instance", kw_only=True):
    """What the leader assigned for a wish: the runners of a pipeline, in order of layers, then of rank; the first is
    the head. `schema/pipeline` finds one's way among them.
    """

    instance_id: InstanceId
    wish_id: str
    card: ModelCard
    context_length: int
    slot_count: int
    engine: str
    stages: tuple[Stage, ...]
    exact: bool = False  # activations are not rounded: a token's logits hardly depend on what is computed beside it
    quantize: Quantizing | None = None  # matrices in full precision are rounded so when they are loaded
    rank_count: int = 1  # how many runners share each layer
    draft: ModelCard | None = None  # the head holds it whole, beside its layers, and guesses with it what comes next
    kv_cache: KvCacheType = KvCacheType.F32  # what keys and values are kept as, the draft's too


class ApiKey(Struct, frozen=True, tag="api_key", kw_only=True):
    """What the cluster remembers of a key that it gave out: enough to know it again, too little to use it."""

    key_id: str  # 12 hex digits; part of the key itself
    name: str  # what people call its holder; unique among the keys that are valid
    salt: bytes
    digest: bytes  # SHA-256 of salt and secret
    created_s: int  # Unix time at the node where it was asked for


class Forgotten(Struct, frozen=True, tag="forgotten"):
    """Deletions whose version counts up to `counter` need not be remembered any more, by anybody."""

    counter: int


Value = Wish | Instance | ApiKey | Forgotten


class Entry(Struct, frozen=True):
    """One key of intent. `value`: msgpack of a `Value`; None where it was deleted (a tombstone).

    It stays encoded, so that what a newer version wrote is kept and passed on byte for byte.
    """

    value: bytes | None
    version: Version


Intent = dict[str, Entry]  # keys: "wish/<id>", "instance/<id>", "key/<id>", "forgotten"


# ---- reports ----


class Hardware(Struct, frozen=True, kw_only=True):
    """What the probe saw. Two nodes with the same `machine_id` share its memory and cores."""

    machine_id: str  # a hash; never the machine's own identifier
    machine_model: str
    processor: str
    physical_cores: int
    logical_cores: int
    os_name: str
    os_version: str
    memory_bytes_total: int
    memory_bytes_available: int
    swap_bytes_total: int
    swap_bytes_available: int
    disk_bytes_total: int
    disk_bytes_available: int
    interfaces: tuple[tuple[str, str], ...] = ()  # (name, IP address)


class DownloadState(StrEnum):
    ONGOING = "Ongoing"
    COMPLETED = "Completed"
    FAILED = "Failed"  # until a person does something about it


class DownloadReport(Struct, frozen=True, kw_only=True):
    model_id: ModelId
    state: DownloadState
    bytes_done: int
    bytes_total: int
    bytes_per_second: float = 0.0
    reason: str = ""  # when failed, or while it waits to be tried again: one sentence


class RunnerReport(Struct, frozen=True, kw_only=True):
    runner_id: RunnerId
    instance_id: InstanceId
    state: RunnerState
    attempt: int
    retries_left: int = 0  # how often it is still started anew after a failure; a failed one with none stays failed
    data_address: Address | None = None  # where its data port listens
    layers_loaded: int = 0
    layers_total: int = 0
    resident_bytes: int = 0  # as of the node's figures of free memory; 0 until it has loaded
    requests_running: int = 0
    requests_queued: int = 0
    reason: str = ""  # when failed: one sentence, then the last lines of its log
    waiting: str = ""  # while it can't start: "has too little memory now: ...", "can't end ...", said of its node


class NodeReport(Struct, frozen=True, tag=True, kw_only=True):
    """What one node says of itself. (boot, sequence) orders its reports; a lower pair than one seen is dropped."""

    node_id: NodeId
    boot: int  # counts the starts of this node; grows for ever
    sequence: int
    name: str
    version: str
    api_address: Address | None
    hardware: Hardware | None
    downloads: tuple[DownloadReport, ...]
    runners: tuple[RunnerReport, ...]
    models_on_disk: tuple[ModelId, ...] = ()
    public_key: bytes = b""  # Ed25519, 32 bytes: its hash is the node's id, so nobody can report another
    notices: tuple[str, ...] = ()  # what a person should do something about there, one sentence each: a full disk


# ---- messages on the mesh ----


class Claim(Struct, frozen=True, order=True):
    """A node's claim to lead. Higher terms win; within one term the lower id wins (`leadership` decides)."""

    term: int
    node_id: NodeId


class Heartbeat(Struct, frozen=True, tag=True):
    """From every node, every `heartbeat_ms`. `hears`: the nodes whose heartbeat reached it within the last `away_ms`.

    Both are named in `control/settings.py`, as are all intervals.
    """

    node_id: NodeId
    boot: int
    sequence: int
    hears: tuple[NodeId, ...]
    claim: Claim | None
    intent_digest: str  # differs from the hearer's: one of the two sends `IntentUpdate` with what it has
    is_leaving: bool = False  # its runners end, then it: nobody is to count on this boot any more
    life: str = ""  # drawn at random at its start: tells it from a node with a copy of its data folder
    age_ms: int = 0  # since that start


class IntentUpdate(Struct, frozen=True, tag=True):
    """Entries to merge: those just written, or a whole map after digests differed.

    The nodes in `keepers` answer `IntentKept` with the same `write` once they have the entries on their disks.
    """

    node_id: NodeId
    entries: Intent
    write: tuple[int, int] = (0, 0)  # (boot, number): which write of `node_id` this is
    keepers: tuple[NodeId, ...] = ()


class IntentKept(Struct, frozen=True, tag=True):
    """From a keeper to whoever asked: these entries would outlive a power cut here."""

    node_id: NodeId
    target: NodeId
    write: tuple[int, int]


NODES_MAX: Final = 1024  # of what may be asked for: far more than a home has, and far from what a number can't hold
RANKS_MAX: Final = 64  # each is linked to all others of its stage
SLOTS_MAX: Final = 1024
TOKENS_MAX: Final = 2**31 - 1


class PlaceModel(Struct, frozen=True, tag=True, kw_only=True):
    """Serve this model. Accepted with the id of its instance; the same command again gives the same instance."""

    card: ModelCard
    node_count_min: int = 1
    context_length: int | None = None  # None: the placement chooses
    slot_count: int | None = None
    node_ids: tuple[NodeId, ...] = ()  # empty: any
    exact: bool = False  # slower, and answers that were interrupted go on as they would have
    quantize: Quantizing | None = None  # round matrices in full precision; refused where there are none
    rank_count: int = 1  # how many runners are to share each layer
    draft: ModelCard | None = None  # a smaller model with the same vocabulary, to guess what comes next
    kv_cache: KvCacheType = KvCacheType.F32  # what keys and values are kept as


class DeleteInstance(Struct, frozen=True, tag=True):
    """End an instance and its wish. `instance_id` may be the wish's own id: it may have no instance now."""

    instance_id: InstanceId


class Rebalance(Struct, frozen=True, tag=True):
    """Place an instance as its wish would be placed now. Accepted with the id that it has then, the same one where
    nothing is to be moved.
    """

    instance_id: InstanceId


class AddKey(Struct, frozen=True, tag=True):
    """Let whoever holds this key in. Accepted with the key's id."""

    key: ApiKey


class RevokeKey(Struct, frozen=True, tag=True):
    """`key`: an id, or a name. Accepted with the key's id."""

    key: str


Command = PlaceModel | DeleteInstance | Rebalance | AddKey | RevokeKey


class CommandRequest(Struct, frozen=True, tag=True):
    """To the leader, from the node where somebody asked."""

    command_id: str
    origin: NodeId
    command: Command


class Accepted(Struct, frozen=True, tag=True):
    """It will outlive a power cut: it is on the disk of the node that decided, and of a second one if one was there."""

    effect_id: str  # of what the command made or ended: an instance, a key
    on_one_node_only: bool = False  # there was no second node, or it did not confirm in time


class Refused(Struct, frozen=True, tag=True):
    """`reason`: one or more sentences for a person. `status`: the HTTP status that fits (400, 404, 409, 503, 507)."""

    reason: str
    status: int = 400


class TimedOut(Struct, frozen=True, tag=True):
    """No leader answered in time; the command may or may not have been carried out."""

    waited_ms: int


CommandOutcome = Accepted | Refused | TimedOut


class CommandResult(Struct, frozen=True):
    """For whoever asked at a node: the id that the command ran under, and what came of it."""

    command_id: str
    outcome: CommandOutcome


class CommandAnswer(Struct, frozen=True, tag=True):
    """From the leader to `CommandRequest.origin`."""

    command_id: str
    target: NodeId
    outcome: CommandOutcome


class CodeSealed(Struct, frozen=True, tag=True):
    """A new join code, which `target` alone can open. Answered by `CodeTaken`."""

    node_id: NodeId
    target: NodeId
    sealed: bytes
    ends_keys: bool = False  # somebody is shut out: no API key of before is valid under the new code


class CodeTaken(Struct, frozen=True, tag=True):
    node_id: NodeId
    target: NodeId


MeshMessage = (
    Heartbeat | NodeReport | IntentUpdate | IntentKept | CommandRequest | CommandAnswer | CodeSealed | CodeTaken
)


# ---- what api and serving look at ----


class Visibility(StrEnum):
    VISIBLE = "visible"  # heard within `away_ms`, in both directions
    AWAY = "away"  # not heard for so long; forgotten `forgotten_ms` after it was last heard


class Member(Struct, frozen=True, kw_only=True):
    node_id: NodeId
    visibility: Visibility
    heard_ms_ago: int  # 0 for this node
    report: NodeReport | None  # None until its first report has come


class InstancePhase(StrEnum):
    WAITING = "waiting"
    LACKING = "lacking"  # a node of it is gone, and those that are left can't hold it
    DOWNLOADING = "downloading"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"  # until a person does something about it


class InstanceStatus(Struct, frozen=True):
    """How far an instance has come."""

    phase: InstancePhase
    text: str  # a few words for a table: "loading 12 of 30 layers", "failed: …"
    explanation: str  # why it can't answer, and what to do if it has failed: sentences for whoever waits for it


class ClusterState(Struct, frozen=True, kw_only=True):
    """A snapshot as this node sees it. `revision` grows with every change that a client could see."""

    node_id: NodeId
    leader: NodeId | None
    revision: int
    members: tuple[Member, ...]  # ordered by node id; includes this node
    wishes: tuple[Wish, ...]
    instances: tuple[Instance, ...]
    notices: tuple[str, ...] = ()  # about this node's network, one sentence each: another cluster, no multicast
