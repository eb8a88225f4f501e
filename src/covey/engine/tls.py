"""Mutual TLS 1.3 between the nodes of one cluster: everything of ours that crosses a wire, and loopback too.

Both sides show a certificate that the cluster's authority signed, and each learns the other's node id, which is the
hash of the key in that certificate: a member that signs itself a certificate with another's name is found out.
A runner's links block in threads; `serving` gives the same contexts to asyncio.
"""

import contextlib
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Generator
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.x509.oid import NameOID

from covey.schema.ids import NodeId
from covey.schema.trust import Credentials, node_id_of

RECEIVE_BYTES: Final = 256 * 1024
SEAL_BYTES: Final = 256 * 1024  # what is encrypted in one go: the other side decrypts while we encrypt the next


class PeerError(ConnectionError):
    """The other side is not the node that it should be, or no member of this cluster; the message is half a sentence
    about it.
    """


# ---- who may talk ----


def server_context(credentials: Credentials) -> ssl.SSLContext:
    """For whoever listens. Resumption is off: each connection shows its certificate anew."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, credentials)
    context.num_tickets = 0
    return context


def client_context(credentials: Credentials) -> ssl.SSLContext:
    """For whoever connects; `peer_of` tells to whom, for no name is compared here."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, credentials)


def _context(role: int, credentials: Credentials) -> ssl.SSLContext:
    context = ssl.SSLContext(role)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=credentials.authority.decode())
    with _as_file(credentials.certificate) as certificate, _as_file(credentials.private_key) as key:
        context.load_cert_chain(certificate, key)
    return context


@contextlib.contextmanager
def _as_file(content: bytes) -> Generator[str]:
    """A name to read `content` from: the ssl module wants files, and a pipe is one that touches no disk."""
    reading, writing = os.pipe()
    try:
        os.write(writing, content)  # a few hundred bytes; a pipe holds thousands before it blocks
        os.close(writing)
        yield f"/dev/fd/{reading}"
    finally:
        os.close(reading)


def peer_of(tls: ssl.SSLObject, expected: NodeId | None = None) -> NodeId:
    """The node at the other end of a connection whose handshake is over. Raises `PeerError`, also if another one was
    `expected`.
    """
    shown = tls.getpeercert(binary_form=True)
    if shown is None:
        raise PeerError("it showed no certificate")
    try:
        certificate = x509.load_der_x509_certificate(shown)
        key, names = certificate.public_key(), certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise PeerError(f"its certificate can't be read ({error})") from error
    if not isinstance(key, Ed25519PublicKey):
        raise PeerError("its certificate holds a key of another kind than nodes have")
    node_id = node_id_of(key.public_bytes_raw())
    if [name.value for name in names] != [node_id]:
        raise PeerError(f"its certificate bears another name than its key, which is of node {node_id[:8]}")
    if expected not in (None, node_id):
        raise PeerError(f"node {node_id[:8]} answers there, not node {expected[:8]}")
    return node_id


def explain(error: Exception) -> str:
    """Why a connection failed, as half a sentence."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not of this cluster ({error.verify_message})"
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or "unknown").lower().replace("_", " ")
        rejected = "alert" in reason and ("unknown ca" in reason or "certificate" in reason)
        return (
            f"it does not take our certificate ({reason}): has it another join code?" if rejected else f"TLS: {reason}"
        )
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    return str(error.strerror or error) if isinstance(error, OSError) else str(error)


# ---- a connection ----


class Channel:
    """A socket that blocks, with TLS on it: one thread may read while another writes.

    OpenSSL's state of a connection is for one thread at a time, and the ssl module's sockets would hold it while they
    wait. So it works on memory here, under a lock, and nobody waits for the network inside.
    """

    def __init__(self, connection: socket.socket, context: ssl.SSLContext, *, is_server: bool) -> None:
        self.socket = connection
        self.silence_ms_max: int | None = None  # how long receiving waits for the next bytes; None: for ever
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=is_server)
        self._lock = threading.Lock()
        self._received = memoryview(bytearray(RECEIVE_BYTES))

    def shake_hands(self, deadline: float, expected: NodeId | None = None) -> NodeId:
        """Who is at the other end. Raises `OSError`: `TimeoutError` after `deadline`, `PeerError`, `ssl.SSLError`."""
        try:
            while not self._try_handshake():
                self.socket.settimeout(_left(deadline))
                if not self._receive():
                    raise ConnectionResetError("it closed the connection before it said who it is")
            return peer_of(self._tls, expected)
        finally:
            with contextlib.suppress(OSError):  # the other side learns why, if it still listens
                self.socket.settimeout(max(deadline - time.monotonic(), 0.001))
                self.socket.sendall(self._outgoing.read())

    def _try_handshake(self) -> bool:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self.socket.sendall(self._outgoing.read())
            return False
        return True

    def seal(self, data: bytes | memoryview) -> bytes:
        """What goes over the wire for `data`; it must be sent in the order of sealing. Raises `ssl.SSLError`."""
        left = memoryview(data)
        with self._lock:
            while left:
                left = left[self._tls.write(left) :]
            return self._outgoing.read()

    def send(self, data: bytes | memoryview) -> None:
        """By one thread at a time. Raises `OSError`."""
        view = memoryview(data)
        for start in range(0, len(view), SEAL_BYTES):
            self.socket.sendall(self.seal(view[start : start + SEAL_BYTES]))

    def receive(self, into: memoryview) -> int:
        """Waits for the first bytes and puts as many as there are; 0 once the other side has closed. By one thread at
        a time. Raises `OSError`: `TimeoutError` after `silence_ms_max`.
        """
        while True:
            # Asking in vain costs an exception, which takes longer than all the rest.
            if (self._tls.pending() or self._incoming.pending) and (count := self._read(into)) is not None:
                return count
            if not self._receive():
                return 0

    def fill(self, into: memoryview) -> int:
        """Waits until `into` is full or the other side has closed; how many bytes came. Raises `OSError`."""
        count = 0
        while count < len(into) and (more := self.receive(into[count:])):
            count += more
        return count

    def _read(self, into: memoryview) -> int | None:
        """What is here already: None until a record is complete, 0 once the other side has closed."""
        with self._lock:
            try:
                count = self._tls.read(len(into), into)
            except ssl.SSLWantReadError:
                return None
            except ssl.SSLZeroReturnError:
                return 0
        assert isinstance(count, int), "given a buffer, it counts"
        return count

    def _receive(self) -> int:
        if self.silence_ms_max is not None:
            self._wait_bytes(self.silence_ms_max)
        count = self.socket.recv_into(self._received)
        with self._lock:
            self._incoming.write(self._received[:count])
        return count

    def _wait_bytes(self, milliseconds: int) -> None:
        """Raises `TimeoutError`. A time limit of the socket would hold for the thread that writes, too."""
        waiting = select.poll()
        waiting.register(self.socket, select.POLLIN)
        if not waiting.poll(milliseconds):
            raise TimeoutError(f"it said nothing for {milliseconds / 1000:.0f} s")


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("it took too long to say who it is")
    return left
