"""A new join code on its way to one node: sealed so that this node alone can open it, not even another member.

X25519 (RFC 7748) with a key pair of this one message, HKDF-SHA256, ChaCha20-Poly1305 (RFC 8439). A node's X25519 key
follows from its Ed25519 identity by the map between their curves (RFC 7748, 4.1): so its id, which everybody knows,
vouches for the key that is sealed to, and whoever reports a key that is not a node's own is found out.
"""

import hashlib
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from covey.control.join_code import SECRET_BYTES, JoinCode
from covey.schema.ids import NodeId
from covey.schema.trust import node_id_of

LABEL: Final = b"covey join code 1"
KEY_BYTES: Final = 32
NONCE: Final = bytes(12)  # each key seals one message
PRIME: Final = 2**255 - 19
SIGN_BIT: Final = 1 << 255


class SealError(Exception):
    """It can't be sealed to, or opened by, this node; the message is half a sentence."""


def sealed_for(target: NodeId, public_key: bytes, code: JoinCode, *, ends_keys: bool = False) -> bytes:
    """`public_key`: the Ed25519 key that the node reports. Raises `SealError` if it is another node's, or none.

    `ends_keys` is said beside the seal, and bound to it.
    """
    if node_id_of(public_key) != target:
        raise SealError("it has not told the key of its identity")
    theirs = _montgomery(public_key)
    once = X25519PrivateKey.generate()
    opener = once.public_key().public_bytes_raw()
    try:
        shared = once.exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError:
        raise SealError("the key of its identity is no point of the curve") from None
    return opener + _cipher(shared, opener, theirs).encrypt(NONCE, code.secret, _beside(target, ends_keys=ends_keys))


def opened_by(key: Ed25519PrivateKey, sealed: bytes, *, ends_keys: bool = False) -> JoinCode:
    """Raises `SealError`."""
    public = key.public_key().public_bytes_raw()
    mine = X25519PrivateKey.from_private_bytes(hashlib.sha512(key.private_bytes_raw()).digest()[:KEY_BYTES])
    opener, text = sealed[:KEY_BYTES], sealed[KEY_BYTES:]
    try:
        shared = mine.exchange(X25519PublicKey.from_public_bytes(opener))
        cipher = _cipher(shared, opener, mine.public_key().public_bytes_raw())
        secret = cipher.decrypt(NONCE, text, _beside(node_id_of(public), ends_keys=ends_keys))
    except (InvalidTag, ValueError):
        raise SealError("it is not sealed for this node") from None
    if len(secret) != SECRET_BYTES:
        raise SealError("what was sealed is no join code")
    return JoinCode(secret)


def _beside(target: NodeId, *, ends_keys: bool) -> bytes:
    """What is not secret, and must not be changed on the way."""
    return f"{target}{' ends keys' if ends_keys else ''}".encode()


def _cipher(shared: bytes, opener: bytes, theirs: bytes) -> ChaCha20Poly1305:
    return ChaCha20Poly1305(HKDF(SHA256(), KEY_BYTES, LABEL, opener + theirs).derive(shared))


def _montgomery(public_key: bytes) -> bytes:
    """The X25519 key of an Ed25519 one: u = (1 + y) / (1 - y)."""
    y = int.from_bytes(public_key, "little") % SIGN_BIT
    return ((1 + y) * pow(1 - y, -1, PRIME) % PRIME).to_bytes(KEY_BYTES, "little") if y != 1 else bytes(KEY_BYTES)
