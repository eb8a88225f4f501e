"""How a link is opened: TLS, then one `wire` frame each way, `LinkHello`, answered by `LinkWelcome` or `LinkRefused`.

So neither a stranger nor a stage of another node or instance, or in the wrong place, ends up in the middle of a
pipeline. The stage before connects. A node behind a firewall or an address translation can only dial out: a stage that
nobody has reached after a while connects to the one before and says `LinkOffer`, and that one sends by this connection.
"""

import logging
import socket
import ssl
import time
from collections.abc import Sequence
from functools import partial
from typing import Final

import msgspec
from msgspec import Struct

from covey.engine.link import Link, LinkBrokenError, LinkClosedError
from covey.engine.link_place import LinkPlace
from covey.engine.tls import Channel, PeerError, explain
from covey.schema.ids import NodeId
from covey.schema.runner import Address, RunnerSpec
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


class LinkHello(Struct, frozen=True, tag=True):
    """Who opens a link: its own stage, and whose it is."""

    instance_id: str
    generation: int
    stage_index: int
    stage_count: int


class LinkOffer(Struct, frozen=True, tag=True):
    """The same of a stage that wants the link from the one before, which may not be able to reach it."""

    instance_id: str
    generation: int
    stage_index: int
    stage_count: int


class LinkWelcome(Struct, frozen=True, tag=True):
    pass


class LinkRefused(Struct, frozen=True, tag=True):
    reason: str


_answers = msgspec.msgpack.Decoder(LinkWelcome | LinkRefused)


def link_refusal(spec: RunnerSpec, first: LinkHello | LinkOffer, peer: NodeId) -> str | None:
    """Why the stage of `spec` does not take a link from, or to, node `peer`, which says `first`."""
    if first.instance_id != spec.instance_id:
        return f"this stage belongs to instance {spec.instance_id}, not {first.instance_id}."
    if spec.stage_count == 1:
        return "this stage is the only one."
    step, goes = (-1, "follows") if isinstance(first, LinkHello) else (1, "comes before")
    expected = (spec.stage_index + step) % spec.stage_count
    if (first.stage_index, first.stage_count) != (expected, spec.stage_count):
        return (
            f"stage {spec.stage_index} of {spec.stage_count} {goes} stage {expected},"
            f" not stage {first.stage_index} of {first.stage_count}."
        )
    if peer != spec.stage_node_ids[expected]:
        return f"stage {expected} belongs to node {spec.stage_node_ids[expected][:8]}, not to node {peer[:8]}."
    return None


class Dialler(Struct, frozen=True):
    """Connects a stage to its neighbours. `addresses` of methods come in the order to be tried."""

    spec: RunnerSpec
    context: ssl.SSLContext

    def connect(self, addresses: Sequence[Address], place: LinkPlace, seconds: float) -> Link:
        """Opens the link to the stage after, trying again for up to `seconds` while it is not there yet, or takes what
        that one offers, which fills `place`.

        Raises `LinkRefusedError`, also where only strangers answer, `LinkBrokenError` if there is none by then, and
        `LinkClosedError` once `place` is closed.
        """
        neighbour = self._neighbour(1, addresses)
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

    def offer(self, addresses: Sequence[Address], place: LinkPlace, seconds: float) -> None:
        """Connects to the stage before, unless that one comes by itself, which fills `place`."""
        neighbour = self._neighbour(-1, addresses)
        deadline = time.monotonic() + seconds
        link = place.wait(min(OFFER_SECONDS, seconds))
        while link is None and not place.is_closed and time.monotonic() < deadline:
            for address in addresses:
                try:
                    channel = self._meet(neighbour, address, deadline)
                    if not place.fill(partial(_agree, channel, neighbour)):
                        channel.socket.close()
                except (OSError, LinkRefusedError) as error:
                    log.info("%s takes no link at %s: %s", neighbour.name, address.host, explain(error))
                time.sleep(RETRY_SECONDS)  # in which it may come by itself
            link = place.wait(RETRY_SECONDS_MAX)

    def _neighbour(self, step: int, addresses: Sequence[Address]) -> "_Neighbour":
        index = (self.spec.stage_index + step) % self.spec.stage_count
        places = ", ".join(f"{address.host}:{address.port}" for address in addresses) or "no address"
        kind = LinkHello if step > 0 else LinkOffer
        first = kind(self.spec.instance_id, self.spec.generation, self.spec.stage_index, self.spec.stage_count)
        return _Neighbour(f"stage {index} at {places}", self.spec.stage_node_ids[index], first, tuple(addresses))

    def _dial_all(self, neighbour: "_Neighbour", place: LinkPlace, deadline: float) -> list[OSError]:
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

    def _meet(self, neighbour: "_Neighbour", address: Address, deadline: float) -> Channel:
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


class _Neighbour(Struct, frozen=True):
    name: str
    node_id: NodeId
    first: LinkHello | LinkOffer  # what it is told
    addresses: tuple[Address, ...]


def _agree(channel: Channel, neighbour: _Neighbour) -> Link:
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
