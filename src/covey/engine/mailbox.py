"""What the threads that listen tell the one that computes. It waits on this alone, so an idle runner sleeps."""

from queue import SimpleQueue

from msgspec import Struct

from covey.engine.connection import ServeConnection
from covey.engine.link import Frame
from covey.schema.generation import ServeCommand
from covey.schema.runner import RunnerCommand


class ServeCame(Struct, frozen=True):
    connection: ServeConnection


class ServeSaid(Struct, frozen=True):
    owner: int
    command: ServeCommand


class ServeGone(Struct, frozen=True):
    owner: int


class LinkLost(Struct, frozen=True):
    reason: str


ServeMessage = ServeCame | ServeSaid | ServeGone
Message = RunnerCommand | ServeMessage | Frame | LinkLost
Mailbox = SimpleQueue[Message]
