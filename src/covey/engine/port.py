"""The runner's data port: takes links from and to its neighbours and, on the head, connections with requests.

Whoever connects has a few seconds to prove by TLS that it is a node of this cluster, and to say what it wants, in a
first frame of a few bytes; anything else is closed, and nothing that comes here can end the runner.
"""

import itertools
import logging
import socket
import threading
import time
from functools import partial
from typing import Final

import msgspec

from covey.engine.connection import ServeConnection
from covey.engine.greeting import (
    Greeting,
    LinkHello,
    LinkOffer,
    LinkRefused,
    LinkWelcome,
    Purpose,
    RankHello,
    RankOffer,
    name_of,
    refusal,
)
from covey.engine.handshake import HELLO_SECONDS, receive_first
from covey.engine.link import Link
from covey.engine.link_place import LinkPlace
from covey.engine.mailbox import Mailbox, ServeCame, ServeGone, ServeSaid
from covey.engine.strangers import Strangers, is_near
from covey.engine.tls import Channel, PeerError, explain, server_context
from covey.schema.generation import ServeHello
from covey.schema.ids import NodeId
from covey.schema.runner import EVERYWHERE, RunnerSpec
from covey.schema.trust import Credentials
from covey.schema.wire import FrameTooLargeError, pack

CONNECTIONS_MAX: Final = 128  # at once, of members: some for each node of a large cluster; each costs two threads
WELCOME_SECONDS_MAX: Final = HELLO_SECONDS - 1  # then the answer may come too late
EXHAUSTED_SECONDS: Final = 0.2  # before the next try where this process has no file descriptor left

log = logging.getLogger(__name__)
First = ServeHello | LinkHello | LinkOffer | RankHello | RankOffer
_firsts = msgspec.msgpack.Decoder(First)


class Reception:
    """What the port takes connections for: one generation of one stage."""

    def __init__(self, spec: RunnerSpec, credentials: Credentials, mailbox: Mailbox) -> None:
        self.spec = spec
        self.context = server_context(credentials)
        self.mailbox = mailbox
        self.before, self.after = LinkPlace(), LinkPlace()  # the links that steps come by, and go on by to a stage
        others = [rank for rank in range(spec.rank_count) if rank != spec.rank]
        self.steps = {rank: LinkPlace() for rank in others if spec.rank == 0}  # the links to those that compute as told
        self.sums = {rank: LinkPlace() for rank in others}
        self.takes_requests = False
        self._coming = threading.Lock()
        self._guests: set[ServeConnection] = set()

    def open_for_requests(self) -> None:
        self.takes_requests = self.spec.stage_index == self.spec.rank == 0

    def place_for(self, first: Greeting) -> LinkPlace:
        """Where a connection goes that is not refused."""
        match first:
            case LinkHello():
                return self.before
            case LinkOffer():
                return self.after
            case RankHello() | RankOffer() if first.purpose is Purpose.SUMS:
                return self.sums[first.rank]
            case RankHello():
                return self.before
            case RankOffer():
                return self.steps[first.rank]

    @property
    def is_closed(self) -> bool:
        return self.before.is_closed

    def welcome(self, guest: ServeConnection) -> bool:
        """Whether this connection with requests may stay; if not, it is closed."""
        with self._coming:
            if self.takes_requests:
                self._guests.add(guest)
                self.mailbox.put(ServeCame(guest))
                return True
        guest.close()
        return False

    def part_with(self, guest: ServeConnection) -> None:
        self.mailbox.put(ServeGone(guest.owner))
        with self._coming:
            self._guests.discard(guest)

    def close(self) -> None:
        """Closes the links and all connections."""
        with self._coming:
            self.takes_requests = False
            guests = tuple(self._guests)
        for place in (self.before, self.after, *self.steps.values(), *self.sums.values()):
            place.close()
        for guest in guests:
            guest.close()


class DataPort:
    def __init__(self, reception: Reception) -> None:
        """Listens on a free port of its `listen_host`. Raises `OSError`."""
        self.reception = reception  # may be replaced; connections that came before keep theirs
        self._listener = _listen(reception.spec.listen_host)
        self.number: int = self._listener.getsockname()[1]
        self._owners = itertools.count(1)
        self._strangers = Strangers()
        self._places = threading.Semaphore(CONNECTIONS_MAX)
        threading.Thread(target=self._accept, name="data port", daemon=True).start()

    def close(self) -> None:
        self.reception.close()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, address = self._listener.accept()
            except OSError as error:
                if self._listener.fileno() < 0:
                    log.info("the data port is closed: %s", error)
                    return
                log.warning("a connection can't be taken: %s", error)
                time.sleep(EXHAUSTED_SECONDS)
                continue
            threading.Thread(target=self._serve, args=(connection,), name=f"from {address}", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        reception = self.reception
        try:
            with self._strangers.hosted(connection):
                channel, peer, first = _meet(connection, reception)
        except (OSError, msgspec.MsgspecError, FrameTooLargeError) as error:
            log.warning("a connection is closed that began with no hello: %s", explain(error))
            connection.close()
            return
        if not self._places.acquire(blocking=False):
            log.warning("node %s is sent away: there are %d connections already", peer, CONNECTIONS_MAX)
            connection.close()
            return
        try:
            self._take(reception, channel, peer, first)
        finally:
            self._places.release()

    def _take(self, reception: Reception, channel: Channel, peer: NodeId, first: First) -> None:
        try:
            if isinstance(first, ServeHello):
                self._take_requests(reception, channel, first)
            else:
                _take_link(reception, channel, peer, first)
        except OSError as error:
            log.warning("a connection of node %s is closed: %s", peer, explain(error))
            channel.socket.close()

    def _take_requests(self, reception: Reception, channel: Channel, hello: ServeHello) -> None:
        if not reception.takes_requests or hello.instance_id != reception.spec.instance_id:
            log.warning("a connection for requests to instance %s is refused", hello.instance_id)
            channel.socket.close()
            return
        guest = ServeConnection(channel, next(self._owners), can_prove_alive=hello.can_prove_alive)
        if not reception.welcome(guest):
            return
        for command in guest.commands():
            reception.mailbox.put(ServeSaid(guest.owner, command))
        reception.part_with(guest)


def _meet(connection: socket.socket, reception: Reception) -> tuple[Channel, NodeId, First]:
    """Who it is and what it wants. Raises `OSError`, `MsgspecError`, `FrameTooLargeError`."""
    if not is_near(connection):
        raise PeerError("it came from the internet")
    deadline = time.monotonic() + HELLO_SECONDS
    channel = Channel(connection, reception.context, is_server=True)
    peer = channel.shake_hands(deadline)
    return channel, peer, _firsts.decode(receive_first(channel, deadline))


def _take_link(reception: Reception, channel: Channel, peer: NodeId, first: Greeting) -> None:
    if reception.is_closed or first.generation != reception.spec.generation:
        channel.socket.close()  # one of the two is late, and will be told; till then it may try again
        return
    reason = refusal(reception.spec, first, peer)
    welcome = partial(_welcome, channel, name_of(first), time.monotonic() + WELCOME_SECONDS_MAX)
    if reason is None and not reception.place_for(first).fill(welcome):
        reason = "this stage has its link already."
    if reason:
        log.warning("a link is refused: %s", reason)
        channel.send(pack(LinkRefused(reason)))
        channel.socket.close()


def _welcome(channel: Channel, name: str, deadline: float) -> Link:
    """Raises `OSError`, also after `deadline`: whoever asked no longer waits for the answer."""
    if time.monotonic() > deadline:
        raise TimeoutError("another connection for the same link held it up for too long")
    channel.send(pack(LinkWelcome()))
    return Link(channel, name)


def _listen(host: str) -> socket.socket:
    """Raises `OSError`."""
    if host == EVERYWHERE and socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=CONNECTIONS_MAX, dualstack_ipv6=True)
    if host == EVERYWHERE:
        return socket.create_server(("", 0), backlog=CONNECTIONS_MAX)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family, backlog=CONNECTIONS_MAX)
