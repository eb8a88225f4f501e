"""The runner's data port: takes the link from the stage before and, on the head, connections with requests.

Whoever connects has a few seconds to say what it is, in a first frame of a few bytes; anything else is closed, and
nothing that comes here can end the runner.
"""

import itertools
import logging
import socket
import threading
from queue import SimpleQueue
from typing import Final

import msgspec

from covey.engine.connection import ServeConnection
from covey.engine.handshake import LinkHello, LinkRefused, LinkWelcome, link_refusal, receive_first
from covey.engine.link import Link
from covey.engine.mailbox import Mailbox, ServeCame, ServeGone, ServeSaid
from covey.schema.generation import ServeHello
from covey.schema.runner import RunnerSpec
from covey.schema.wire import FrameTooLargeError, pack

CONNECTIONS_MAX: Final = 128  # at once: some for each node of a large cluster; each costs two threads

log = logging.getLogger(__name__)
_firsts = msgspec.msgpack.Decoder(ServeHello | LinkHello)


class DataPort:
    def __init__(self, spec: RunnerSpec, mailbox: Mailbox) -> None:
        """Listens on a free port of `spec.listen_host`. Raises `OSError`."""
        self._spec = spec
        self._mailbox = mailbox
        family = socket.AF_INET6 if ":" in spec.listen_host else socket.AF_INET
        self._listener = socket.create_server((spec.listen_host, 0), family=family, backlog=CONNECTIONS_MAX)
        self.number: int = self._listener.getsockname()[1]
        self.links: SimpleQueue[Link] = SimpleQueue()  # gets the one from the stage before, once it has come
        self._owners = itertools.count(1)
        self._places = threading.Semaphore(CONNECTIONS_MAX)
        self._lock = threading.Lock()
        self._linked = spec.stage_count == 1
        self._open = False
        threading.Thread(target=self._accept, name="data port", daemon=True).start()

    def open_for_requests(self) -> None:
        self._open = self._spec.stage_index == 0

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, address = self._listener.accept()
            except OSError as error:
                log.info("the data port is closed: %s", error)
                return
            if self._places.acquire(blocking=False):
                threading.Thread(target=self._serve, args=(connection,), name=f"from {address}", daemon=True).start()
            else:
                log.warning("%s is sent away: there are %d connections already", address, CONNECTIONS_MAX)
                connection.close()

    def _serve(self, connection: socket.socket) -> None:
        try:
            first = _firsts.decode(receive_first(connection))
            if isinstance(first, LinkHello):
                self._take_link(connection, first)
            else:
                self._take_requests(connection, first)
        except (OSError, msgspec.MsgspecError, FrameTooLargeError) as error:
            log.warning("a connection is closed that began with no hello: %s", error)
            connection.close()
        finally:
            self._places.release()

    def _take_link(self, connection: socket.socket, hello: LinkHello) -> None:
        with self._lock:
            reason = "this stage has its link already." if self._linked else link_refusal(self._spec, hello)
            self._linked = self._linked or reason is None
        if reason:
            log.warning("a link is refused: %s", reason)
            connection.sendall(pack(LinkRefused(reason)))
            connection.close()
        else:
            connection.sendall(pack(LinkWelcome()))
            self.links.put(Link(connection, f"stage {hello.stage_index}"))

    def _take_requests(self, connection: socket.socket, hello: ServeHello) -> None:
        if not self._open or hello.instance_id != self._spec.instance_id:
            log.warning("a connection for requests to instance %s is refused", hello.instance_id)
            connection.close()
            return
        owner = next(self._owners)
        serve = ServeConnection(connection, owner)
        self._mailbox.put(ServeCame(serve))
        for command in serve.commands():
            self._mailbox.put(ServeSaid(owner, command))
        self._mailbox.put(ServeGone(owner))
