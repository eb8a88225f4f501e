"""How messages are framed on pipes and sockets: a little-endian uint32 length, then MessagePack.

Activations on pipeline links have a frame of their own (see `engine/link`).
"""

from typing import Any, Final

import msgspec

FRAME_BYTES_MAX: Final = 64 * 1024 * 1024  # a 1 M token prompt is under 6 MB; more is a mistake or an attack
LENGTH_BYTES: Final = 4

_encoder = msgspec.msgpack.Encoder()


class FrameTooLargeError(Exception):
    """The other side announced a frame over `FRAME_BYTES_MAX`."""


def pack(message: Any) -> bytes:
    """One frame that holds `message` (a Struct)."""
    body = _encoder.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def body_length(prefix: bytes | bytearray) -> int:
    """Bytes that follow the 4-byte `prefix`. Raises `FrameTooLargeError`."""
    length = int.from_bytes(prefix, "little")
    if length > FRAME_BYTES_MAX:
        raise FrameTooLargeError(f"a frame of {length} bytes was announced; the limit is {FRAME_BYTES_MAX}")
    return length


class FrameBuffer:
    """Collects bytes and gives back the bodies of the frames that are complete."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Adds `data`; returns the bodies completed by it, in order. Raises `FrameTooLargeError`."""
        self._bytes += data
        bodies: list[bytes] = []
        start = 0
        while len(self._bytes) - start >= LENGTH_BYTES:
            end = start + LENGTH_BYTES + body_length(self._bytes[start : start + LENGTH_BYTES])
            if len(self._bytes) < end:
                break
            bodies.append(bytes(self._bytes[start + LENGTH_BYTES : end]))
            start = end
        del self._bytes[:start]
        return bodies
