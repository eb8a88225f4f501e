"""The mesh process: one Zenoh session, where it can be replaced. `python -m covey.effects.mesh_process`.

A session does not survive a change of addresses, and can't be opened a second time in one process; a process of its
own is replaced within a second. It imports little, so that it starts quickly. The node speaks to it over its standard
input and output; the end of the input, which the node's death is too, ends it.
"""

import base64
import contextlib
import json
import os
import queue
import secrets
import socket
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Final, NoReturn

import msgspec
import zenoh

from covey.effects.beacon import Beacons
from covey.effects.endpoints import endpoint
from covey.engine.parent import end_with_parent
from covey.schema.mesh import (
    FromMesh,
    Got,
    Linked,
    MeshSetup,
    MeshTls,
    Opened,
    OpenFailed,
    Ping,
    Pong,
    Put,
    ToMesh,
    Urgency,
)
from covey.schema.wire import FrameBuffer, FrameTooLargeError, pack

READ_BYTES: Final = 64 * 1024
INPUT, OUTPUT, ERROR = 0, 1, 2  # file descriptors
MESSAGE_BYTES_MAX: Final = 16 * 1024 * 1024  # a whole intent of thousands of instances is under 4 MB
PATIENT_MAX: Final = 1024  # messages that wait for slow peers
ZENOH_ID_BYTES: Final = 16
CLOSE_S_MAX: Final = 1.0
BEAT_WAIT_US: Final = 20_000  # for a place in the queue; Zenoh's 1 ms is short where other programs compute
OPEN_TIMEOUT_MS: Final = 3000  # for one address of a peer; it may have several that are not reached from here

_decoder = msgspec.msgpack.Decoder(ToMesh)


class Pipe:
    """The line to the node. What anybody else prints goes to standard error."""

    def __init__(self) -> None:
        self._input, self._output = os.dup(INPUT), os.dup(OUTPUT)
        os.dup2(ERROR, OUTPUT)
        self._lock = threading.Lock()

    def tell(self, message: FromMesh) -> None:
        """From any thread. Waits while the node does not read."""
        data = pack(message)
        try:
            with self._lock:
                while data:
                    data = data[os.write(self._output, data) :]
        except BrokenPipeError:
            os._exit(1)  # the node is gone

    def messages(self) -> Iterable[ToMesh]:
        """Until the node closes its end. Raises `msgspec.DecodeError`, `FrameTooLargeError`."""
        frames = FrameBuffer()
        while data := os.read(self._input, READ_BYTES):
            for body in frames.feed(data):
                yield _decoder.decode(body)


class Session:
    """An open Zenoh session and what belongs to it."""

    def __init__(self, setup: MeshSetup, pipe: Pipe) -> None:
        """Raises `zenoh.ZError`."""
        self._pipe = pipe
        self._zenoh, self.opened = _open(setup)
        self._patient: queue.Queue[Put] = queue.Queue(PATIENT_MAX)
        self._count_lock = threading.Lock()
        self._linked = 0
        self._has_warned = False
        self._beacons: Beacons | None = None
        for key in setup.subscriptions:
            self._zenoh.declare_subscriber(key, self._on_sample)
        self._zenoh.info.declare_transport_events_listener(self._on_transport, history=True)
        threading.Thread(target=self._put_patient, name="patient", daemon=True).start()
        self._start_beacons(setup)

    def put(self, put: Put) -> None:
        if put.urgency is Urgency.BEAT:
            self._put(put, zenoh.CongestionControl.DROP)
            return
        try:
            self._patient.put_nowait(put)
        except queue.Full:
            self._warn("other nodes take messages too slowly; some are dropped")

    def close(self) -> None:
        """Within a bound: other nodes then know at once that this one is gone."""
        closing = threading.Thread(target=self._zenoh.close, name="closing", daemon=True)
        closing.start()
        closing.join(CLOSE_S_MAX)

    def _start_beacons(self, setup: MeshSetup) -> None:
        if not setup.beacon.addresses:
            return
        sender = str(self._zenoh.zid())
        self._beacons = Beacons(setup.beacon, sender, self.opened.port, self._pipe.tell, self._is_linked)
        self._beacons.node_count += self._linked
        self._beacons.start()

    def _is_linked(self, sender: str) -> bool:
        return any(str(zid) == sender for zid in self._zenoh.info.peers_zid())

    def _put_patient(self) -> NoReturn:
        while True:
            self._put(self._patient.get(), zenoh.CongestionControl.BLOCK)

    def _put(self, put: Put, congestion: zenoh.CongestionControl) -> None:
        is_beat = put.urgency is Urgency.BEAT
        try:
            self._zenoh.put(
                put.key,
                put.payload,
                congestion_control=congestion,
                priority=zenoh.Priority.INTERACTIVE_HIGH if is_beat else zenoh.Priority.DATA,
                express=is_beat,
                allowed_destination=zenoh.Locality.REMOTE,
            )
        except zenoh.ZError as error:
            self._warn(f"a message could not be sent to the other nodes: {error}")

    def _warn(self, sentence: str) -> None:
        """Once in a life."""
        if not self._has_warned:
            self._has_warned = True
            sys.stderr.write(f"covey: {sentence}\n")

    def _on_sample(self, sample: zenoh.Sample) -> None:
        payload = sample.payload
        if len(payload) <= MESSAGE_BYTES_MAX:
            self._pipe.tell(Got(str(sample.key_expr), payload.to_bytes()))

    def _on_transport(self, event: zenoh.TransportEvent) -> None:
        with self._count_lock:
            self._linked += 1 if event.kind == zenoh.SampleKind.PUT else -1
            if self._beacons is not None:
                self._beacons.node_count = self._linked + 1
            self._pipe.tell(Linked(self._linked))


def _open(setup: MeshSetup) -> tuple[zenoh.Session, Opened]:
    """Tries the preferred port, then any; and where the system knows no multicast, goes without scouting."""
    has_scouting = bool(setup.scouting_interfaces)
    attempts = [(setup.port, has_scouting), (0, has_scouting), (0, False)]
    for wanted, is_scouting in attempts[:-1]:
        with contextlib.suppress(zenoh.ZError):
            return _open_at(setup, wanted, has_scouting=is_scouting)
    return _open_at(setup, 0, has_scouting=False)


def _open_at(setup: MeshSetup, wanted: int, *, has_scouting: bool) -> tuple[zenoh.Session, Opened]:
    """Zenoh does not tell which port the system gave it, so a free one is asked for before."""
    port = wanted or _free_port(setup.addresses)
    session = zenoh.open(config(setup, port, has_scouting=has_scouting))
    return session, Opened(port, has_scouting or not setup.scouting_interfaces)


def _free_port(addresses: Sequence[str]) -> int:
    """0 where nothing is to listen."""
    if not addresses:
        return 0
    family, _, _, _, where = socket.getaddrinfo(addresses[0], 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family) as probe:
        probe.bind(where)
        return int(probe.getsockname()[1])


def config(setup: MeshSetup, port: int, *, has_scouting: bool) -> zenoh.Config:
    """Zenoh's own id is made here, so that it is fresh for each process: nobody would see two of one id."""
    values: dict[str, Any] = {
        "mode": "peer",
        "id": _fresh_id(),
        "namespace": setup.namespace,
        "listen/endpoints": [endpoint(address, port) for address in setup.addresses],
        "connect/endpoints": list(setup.connect),
        "scouting/multicast/enabled": has_scouting,
        "scouting/multicast/address": f"{setup.scouting_group}:{setup.scouting_port}",
        "transport/link/rx/max_message_size": MESSAGE_BYTES_MAX * 2,
        "transport/link/tx/queue/congestion_control/drop/wait_before_drop": BEAT_WAIT_US,
        "transport/link/protocols": ["tls"],
        # What neighbours on one machine share stays mapped when one of them is killed: 20 MB each time, and a file.
        "transport/shared_memory/enabled": False,
        "transport/unicast/open_timeout": OPEN_TIMEOUT_MS,
        **_tls_values(setup.tls),
    }
    if has_scouting:
        values["scouting/multicast/interface"] = ",".join(setup.scouting_interfaces)
    made = zenoh.Config()
    for key, value in values.items():
        made.insert_json5(key, json.dumps(value))
    return made


def _tls_values(tls: MeshTls) -> dict[str, Any]:
    """Both sides show a certificate. Names in it are not compared with addresses, which change."""
    certificate, key = _base64(tls.certificate), _base64(tls.private_key)
    return {
        "transport/link/tls/root_ca_certificate_base64": _base64(tls.authority),
        "transport/link/tls/listen_certificate_base64": certificate,
        "transport/link/tls/listen_private_key_base64": key,
        "transport/link/tls/connect_certificate_base64": certificate,
        "transport/link/tls/connect_private_key_base64": key,
        "transport/link/tls/enable_mtls": True,
        "transport/link/tls/verify_name_on_connect": False,
    }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _fresh_id() -> str:
    """Hex digits without a leading zero, which Zenoh refuses."""
    return f"{secrets.randbits(ZENOH_ID_BYTES * 8) | 1 << ZENOH_ID_BYTES * 8 - 1:x}"


def main() -> NoReturn:
    end_with_parent()
    pipe = Pipe()
    status = 1
    try:
        _serve(pipe)
        status = 0
    except zenoh.ZError as error:
        pipe.tell(OpenFailed(str(error)))
    except (msgspec.DecodeError, FrameTooLargeError) as error:
        sys.stderr.write(f"covey: the mesh process can't read what its node says: {error}\n")
    os._exit(status)  # Zenoh's threads may hang at an ordinary exit


def _serve(pipe: Pipe) -> None:
    session: Session | None = None
    for message in pipe.messages():
        match message:
            case MeshSetup():
                session = Session(message, pipe)
                pipe.tell(session.opened)
            case Ping():
                pipe.tell(Pong())
            case Put() if session is not None:
                session.put(message)
            case Put():
                raise msgspec.ValidationError("a message to send came before the setup")
    if session is not None:
        session.close()


if __name__ == "__main__":
    main()
