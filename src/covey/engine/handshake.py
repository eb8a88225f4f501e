"""How a link is opened: TLS, then one `wire` frame each way, `LinkHello`, answered by `LinkWelcome` or `LinkRefused`.

So neither a stranger nor a stage of another node or instance, or in the wrong place, ends up in the middle of a
pipeline. The stage before connects; a node that nobody can reach may hold no stage but the only one.
"""

import socket
import ssl
import time
from collections.abc import Sequence
from typing import Final

import msgspec
from msgspec import Struct

from covey.engine.link import Link, LinkBrokenError
from covey.engine.tls import Channel, PeerError, explain
from covey.schema.ids import NodeId
from covey.schema.runner import Address, RunnerSpec
from covey.schema.wire import LENGTH_BYTES, FrameTooLargeError, body_length, pack

HELLO_BYTES_MAX: Final = 4096  # a stranger's first frame makes nobody reserve memory
HELLO_SECONDS: Final = 5.0  # who connects has its hello ready
REACH_SECONDS: Final = 2.0  # one address that swallows packets leaves time for the others
RETRY_SECONDS: Final = 0.05  # grows to ...
RETRY_SECONDS_MAX: Final = 1.0


class LinkRefusedError(Exception):
    """The other side does not want this link, and says why."""


class LinkHello(Struct, frozen=True, tag=True):
    """Who opens a link: its own stage, and whose it is."""

    instance_id: str
    stage_index: int
    stage_count: int


class LinkWelcome(Struct, frozen=True, tag=True):
    pass


class LinkRefused(Struct, frozen=True, tag=True):
    reason: str


_answers = msgspec.msgpack.Decoder(LinkWelcome | LinkRefused)


def hello_of(spec: RunnerSpec) -> LinkHello:
    return LinkHello(spec.instance_id, spec.stage_index, spec.stage_count)


def link_refusal(spec: RunnerSpec, hello: LinkHello, peer: NodeId) -> str | None:
    """Why the stage of `spec` does not take a link from node `peer`, which says `hello`."""
    if hello.instance_id != spec.instance_id:
        return f"this stage belongs to instance {spec.instance_id}, not {hello.instance_id}."
    before = (spec.stage_index - 1) % spec.stage_count
    if (hello.stage_index, hello.stage_count) != (before, spec.stage_count):
        return (
            f"stage {spec.stage_index} of {spec.stage_count} follows stage {before},"
            f" not stage {hello.stage_index} of {hello.stage_count}."
        )
    if peer != spec.stage_node_ids[before]:
        return f"stage {before} belongs to node {spec.stage_node_ids[before][:8]}, not to node {peer[:8]}."
    return None


def connect(spec: RunnerSpec, addresses: Sequence[Address], context: ssl.SSLContext, seconds: float) -> Link:
    """Opens the link to the stage after that of `spec`, trying again for up to `seconds` while it is not there yet.

    Raises `LinkRefusedError`, also where only strangers answer, and `LinkBrokenError` if the stage can't be reached.
    """
    following = (spec.stage_index + 1) % spec.stage_count
    places = ", ".join(f"{address.host}:{address.port}" for address in addresses) or "no address"
    peer = f"stage {following} at {places}"
    deadline, pause = time.monotonic() + seconds, RETRY_SECONDS
    while True:
        failures: list[OSError] = []
        for address in addresses:
            try:
                return _introduce(spec, address, context, peer, deadline)
            except OSError as error:
                failures.append(error)
        reasons = "; ".join(dict.fromkeys(map(explain, failures))) or "its node reports none that can be reached"
        if failures and all(isinstance(error, PeerError | ssl.SSLError) for error in failures):
            raise LinkRefusedError(f"No link to {peer}: {reasons}.")
        left = deadline - time.monotonic()
        if left <= 0 or not addresses:
            raise LinkBrokenError(f"No link to {peer} within {seconds:.0f} s: {reasons}.")
        time.sleep(min(pause, left))
        pause = min(2 * pause, RETRY_SECONDS_MAX)


def _introduce(spec: RunnerSpec, address: Address, context: ssl.SSLContext, peer: str, deadline: float) -> Link:
    """One try at one address. Raises `OSError` where another may help."""
    left = max(deadline - time.monotonic(), RETRY_SECONDS)
    connection = socket.create_connection((address.host, address.port), min(left, REACH_SECONDS))
    try:
        channel = Channel(connection, context, is_server=False)
        answer = _exchange(spec, channel, time.monotonic() + min(left, HELLO_SECONDS))
    except BaseException:
        connection.close()
        raise
    if isinstance(answer, LinkRefused):
        connection.close()
        raise LinkRefusedError(f"The link to {peer} was refused: {answer.reason}")
    return Link(channel, peer)


def _exchange(spec: RunnerSpec, channel: Channel, deadline: float) -> LinkWelcome | LinkRefused:
    """Raises `OSError`."""
    channel.shake_hands(deadline, spec.stage_node_ids[(spec.stage_index + 1) % spec.stage_count])
    try:
        channel.send(pack(hello_of(spec)))
        return _answers.decode(receive_first(channel, deadline))
    except (msgspec.MsgspecError, FrameTooLargeError) as error:
        raise OSError(f"it did not answer as a stage does ({error})") from error


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
