"""Messages of the mesh, sealed with the cluster's key: only a member can read or write them.

The links are mutual TLS, but Zenoh, when it connects, also takes a certificate of any authority that web browsers
trust. So a stranger with a certificate for some domain could pass for a peer; what is sealed stays closed to him.
ChaCha20-Poly1305 (RFC 8439) with random nonces, and a key for each sender, so that none ever seals 2^32 messages.
"""

import hashlib
import os
from functools import lru_cache
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

NONCE_BYTES: Final = 12
CIPHERS_MAX: Final = 1024


class SealError(Exception):
    """Not sealed with this key, or for another place."""


class Seal:
    """`key`: 32 bytes. `place` ends with the sender's id; a message that is moved to another place does not open."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._cipher = lru_cache(CIPHERS_MAX)(self._made_cipher)

    def close(self, message: bytes, place: str) -> bytes:
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._cipher(_sender(place)).encrypt(nonce, message, place.encode())

    def open(self, sealed: bytes, place: str) -> bytes:
        """Raises `SealError`."""
        try:
            return self._cipher(_sender(place)).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], place.encode())
        except (InvalidTag, ValueError):
            raise SealError("it is not sealed with this cluster's key") from None

    def _made_cipher(self, sender: str) -> ChaCha20Poly1305:
        return ChaCha20Poly1305(hashlib.blake2s(sender.encode(), key=self._key).digest())


def _sender(place: str) -> str:
    return place.rpartition("/")[2]
