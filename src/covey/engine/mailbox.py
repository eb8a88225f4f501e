"""What the threads that listen tell the one that computes. It waits on this alone, so an idle runner sleeps."""

from queue import SimpleQueue

from msgspec import Struct

from covey.engine.connection import ServeConnection
from covey.engine.link import Frame, Link
from covey.schema.generation import ServeCommand
from covey.schema.runner import RunnerCommand


class ServeCame(Struct, frozen=True):
    connection: ServeConnection


class ServeSaid(Struct, frozen=True):
    owner: int
    command: ServeCommand


class ServeGone(Struct, frozen=True):
    owner: int


class Linked(Struct, frozen=True):
    """All neighbours are. Alone, a stage has no link.

    `before`: where steps come from, which for ranks above 0 is rank 0 of their stage. `steps`: at rank 0, where they go
    to beside the stage after. `sums`: the connections to the other ranks, by rank.
    """

    before: Link | None = None
    after: Link | None = None
    steps: tuple[Link, ...] = ()
    sums: dict[int, Link] = {}


class Unlinked(Struct, frozen=True):
    """They can't be."""

    error: Exception


class LinkLost(Struct, frozen=True):
    reason: str


ServeMessage = ServeCame | ServeSaid | ServeGone
Message = RunnerCommand | ServeMessage | Frame | Linked | Unlinked | LinkLost
Mailbox = SimpleQueue[Message]
