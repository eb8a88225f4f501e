"""How a link is opened: TLS, then one `wire` frame each way, as `greeting` has them.

So neither a stranger nor a stage of another node or instance, or in the wrong place, ends up in the middle of a
pipeline. The stage before connects. A node behind a firewall or an address translation can only dial out: a stage that
nobody has reached after a while connects to the one before and offers the link, and that one sends by this connection.
Between the ranks of a stage it is the same: the lower one connects, or else the higher one offers.
"""

import logging
import socket
import ssl
import time
from functools import partial
from typing import Final

import msgspec
from msgspec import Struct

from covey.engine.greeting import LinkRefused, LinkWelcome, Neighbour
from covey.engine.link import Link, LinkBrokenError, LinkClosedError
from covey.engine.link_place import LinkPlace
from covey.engine.tls import Channel, PeerError, explain
from covey.schema.runner import Address
from covey.schema.wire import LENGTH_BYTES, FrameTooLargeError, body_length, pack

HELLO_BYTES_MAX: Final = 4096  # a stranger's first frame makes nobody reserve memory
HELLO_SECONDS: Final = 5.0  # who connects has its hello ready
REACH_SECONDS: Final = 2.0  # one address that swallows packets leaves time for the others
RETRY_SECONDS: Final = 0.05  # grows to ...
RETRY_SECONDS_MAX: Final = 1.0
OFFER_SECONDS: Final = 3.0  # a stage that can be reached is, by then; all start at the same time

log = logging.getLogger(__name__)


class LinkRefusedError(Exception):
    """The other side does not want this link, and says why."""


_answers = msgspec.msgpack.Decoder(LinkWelcome | LinkRefused)


class Dialler(Struct, frozen=True):
    """Connects a runner to its neighbours."""

    context: ssl.SSLContext

    def connect(self, neighbour: Neighbour, place: LinkPlace, seconds: float) -> Link:
        """Opens a link to one that waits for it, trying again for up to `seconds` while it is not there yet, or takes
        what that one offers, which fills `place`.

        Raises `LinkRefusedError`, also where only strangers answer, `LinkBrokenError` if there is none by then, and
        `LinkClosedError` once `place` is closed.
        """
        begun, pause = time.monotonic(), RETRY_SECONDS
        deadline, known = begun + seconds, dict[str, None]()
        while True:
            failures = self._dial_all(neighbour, place, deadline)
            known |= dict.fromkeys(map(explain, failures))
            reasons = "; ".join(known) or "its node reports none that can be reached"
            left = deadline - time.monotonic()
            if link := place.wait(min(pause, left)):
                return link
            if place.is_closed:
                raise LinkClosedError(f"No link to {neighbour.name}: this stage begins anew.")
            is_offered_late = time.monotonic() - begun > 2 * OFFER_SECONDS
            if is_offered_late and failures and all(isinstance(error, PeerError | ssl.SSLError) for error in failures):
                raise LinkRefusedError(f"No link to {neighbour.name}: {reasons}.")
            if left <= 0:
                raise LinkBrokenError(f"No link to {neighbour.name} within {seconds:.0f} s: {reasons}.")
            pause = min(2 * pause, RETRY_SECONDS_MAX)

    def offer(self, neighbour: Neighbour, place: LinkPlace, seconds: float) -> None:
        """Connects to one that should open the link, unless it does, which fills `place`."""
        deadline = time.monotonic() + seconds
        link = place.wait(min(OFFER_SECONDS, seconds))
        while link is None and not place.is_closed and time.monotonic() < deadline:
            for address in neighbour.addresses:
                try:
                    channel = self._meet(neighbour, address, deadline)
                    if not place.fill(partial(_agree, channel, neighbour)):
                        channel.socket.close()
                except (OSError, LinkRefusedError) as error:
                    log.info("%s takes no link at %s: %s", neighbour.name, address.host, explain(error))
                time.sleep(RETRY_SECONDS)  # in which it may come by itself
            link = place.wait(RETRY_SECONDS_MAX)

    def _dial_all(self, neighbour: Neighbour, place: LinkPlace, deadline: float) -> list[OSError]:
        """Tries each address until `place` is filled; what failed. Raises `LinkRefusedError`."""
        failures: list[OSError] = []
        for address in neighbour.addresses:
            if place.wait(0) or place.is_closed:
                break
            try:
                link = _agree(self._meet(neighbour, address, deadline), neighbour)
            except OSError as error:
                failures.append(error)
            except LinkRefusedError:
                if place.settle() is None:  # else it refused because it had offered one itself
                    raise
            else:
                if not place.fill(lambda: link):  # noqa: B023 - called at once
                    link.close()
        return failures

    def _meet(self, neighbour: Neighbour, address: Address, deadline: float) -> Channel:
        """One try at one address: a connection to the neighbour's node. Raises `OSError` where another may help."""
        left = max(deadline - time.monotonic(), RETRY_SECONDS)
        connection = socket.create_connection((address.host, address.port), min(left, REACH_SECONDS))
        try:
            channel = Channel(connection, self.context, is_server=False)
            channel.shake_hands(time.monotonic() + min(left, HELLO_SECONDS), neighbour.node_id)
        except BaseException:
            connection.close()
            raise
        return channel


def _agree(channel: Channel, neighbour: Neighbour) -> Link:
    """Makes a link of the connection, or closes it. Raises `OSError` where another may help, `LinkRefusedError`."""
    try:
        channel.socket.settimeout(HELLO_SECONDS)
        channel.send(pack(neighbour.first))
        answer = _answers.decode(receive_first(channel, time.monotonic() + HELLO_SECONDS))
    except (msgspec.MsgspecError, FrameTooLargeError) as error:
        channel.socket.close()
        raise OSError(f"it did not answer as a stage does ({error})") from error
    except OSError:
        channel.socket.close()
        raise
    if isinstance(answer, LinkRefused):
        channel.socket.close()
        raise LinkRefusedError(f"The link to {neighbour.name} was refused: {answer.reason}")
    return Link(channel, neighbour.name)


def receive_first(channel: Channel, deadline: float) -> bytes:
    """The body of the frame that opens a connection. Raises `OSError`, `FrameTooLargeError`."""
    length = body_length(_receive_exactly(channel, LENGTH_BYTES, deadline))
    if length > HELLO_BYTES_MAX:
        raise FrameTooLargeError(f"a first frame of {length} bytes was announced; the limit is {HELLO_BYTES_MAX}")
    return _receive_exactly(channel, length, deadline)


def _receive_exactly(channel: Channel, length: int, deadline: float) -> bytes:
    data = bytearray(length)
    count = 0
    while count < length:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("its hello took too long")
        channel.socket.settimeout(left)
        more = channel.receive(memoryview(data)[count:])
        if not more:
            raise ConnectionResetError("it closed the connection")
        count += more
    return bytes(data)
