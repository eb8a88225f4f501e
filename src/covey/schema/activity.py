"""What happened in a cluster, in words for a person. Never a prompt, never an answer."""

from enum import StrEnum

from msgspec import Struct


class EventKind(StrEnum):
    NODE_JOINED = "node_joined"
    NODE_AWAY = "node_away"
    NODE_BACK = "node_back"
    NODE_LEFT = "node_left"
    LEADER_CHANGED = "leader_changed"
    INSTANCE_PLACED = "instance_placed"
    INSTANCE_READY = "instance_ready"
    INSTANCE_REMOVED = "instance_removed"
    COMMAND_REFUSED = "command_refused"
    COMMAND_TIMED_OUT = "command_timed_out"
    RUNNER_FAILED = "runner_failed"
    DOWNLOAD_BEGUN = "download_begun"
    DOWNLOAD_COMPLETED = "download_completed"
    DOWNLOAD_FAILED = "download_failed"
    KEY_ADDED = "key_added"
    KEY_REVOKED = "key_revoked"


class ActivityEvent(Struct, frozen=True, kw_only=True):
    """One thing that happened, as this node saw it. `number` counts from 1 in the order of seeing."""

    number: int
    at_ms: int  # Unix time by this node's clock
    kind: EventKind
    subject: str  # the id of the node, instance, runner or key; the name of the model for downloads and commands
    text: str  # one sentence


class ActivityPage(Struct, frozen=True):
    """Some events in order. `first_number`: the oldest event's that is still kept."""

    events: tuple[ActivityEvent, ...]
    first_number: int
