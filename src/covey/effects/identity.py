"""Who this node is, for as long as its data folder lives: an Ed25519 key, and a count of its starts.

The node's id is the hash of its public key. A key that can't be read is an error with a sentence, never a reason for
a new identity: other nodes would see a stranger, and the old node would haunt them.
"""

import errno
import logging
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from msgspec import Struct

from covey.effects.durable import LockedError, locked, write_durably
from covey.effects.paths import make_private
from covey.schema import trust
from covey.schema.ids import NodeId

KEY_FILE: Final = "node.key"
BOOT_FILE: Final = "boot"
LOCK_FILE: Final = "lock"
PRIVATE_MODE: Final = 0o600

_CAUSES: Final = {
    errno.EEXIST: "there is a file of that name",
    errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.EACCES: "you have no permission for it",
    errno.EPERM: "you have no permission for it",
    errno.EROFS: "its disk can't be written to",
    errno.ENOSPC: "its disk is full",
    errno.EDQUOT: "your quota of its disk is used up",
}

_log = logging.getLogger(__name__)


class IdentityError(Exception):
    """The data folder can't be used; the message is one sentence for a person."""


class Identity(Struct, frozen=True):
    node_id: NodeId
    boot: int  # grows with every start
    key: Ed25519PrivateKey


@contextmanager
def claimed(folder: Path) -> Generator[Identity]:
    """The identity that lives in `folder`, and this process as its only user until the block ends.

    Made at the first start. Raises `IdentityError`.
    """
    with ExitStack() as held:
        try:
            make_private(folder)
            held.enter_context(locked(folder / LOCK_FILE))
            identity = _identity(folder)
        except LockedError as error:
            raise IdentityError(_in_use(folder, error.holder)) from None
        except OSError as error:
            raise IdentityError(_unusable(folder, error)) from None
        yield identity


def renewed(folder: Path, mine: Identity) -> Identity:
    """The same node in its next life, in the same process: others must not take it for the former one.

    Raises `IdentityError`.
    """
    try:
        return Identity(mine.node_id, _next_boot(folder / BOOT_FILE, is_first=False), mine.key)
    except OSError as error:
        raise IdentityError(_unusable(folder, error)) from None


def _unusable(folder: Path, error: OSError) -> str:
    cause = _CAUSES.get(error.errno or 0) or error.strerror or str(error)
    return f"the data folder {folder} can't be used: {cause}; mend that, or choose another one with --data-dir"


def _in_use(folder: Path, holder: str) -> str:
    process = f"process {holder}" if holder else "another process"
    return (
        f"the data folder {folder} is in use by {process}; "
        "stop that node first, or give this one a folder and a port of its own with --data-dir and --port"
    )


def node_id_of(key: Ed25519PrivateKey) -> NodeId:
    return trust.node_id_of(key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))


def _identity(folder: Path) -> Identity:
    path = folder / KEY_FILE
    is_first = not path.exists()
    key = _make_key(path) if is_first else _read_key(path)
    return Identity(node_id_of(key), _next_boot(folder / BOOT_FILE, is_first=is_first), key)


def _make_key(path: Path) -> Ed25519PrivateKey:
    key = Ed25519PrivateKey.generate()
    write_durably(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), PRIVATE_MODE)
    return key


def _read_key(path: Path) -> Ed25519PrivateKey:
    if path.stat().st_mode & 0o077:
        _log.warning("the key %s could be read by other users; now only you can", path)
        path.chmod(PRIVATE_MODE)
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise IdentityError(
            f"the key of this node, {path}, is damaged; put it back from a backup, "
            "or remove it to make this a new node with another id"
        )
    return key


def _next_boot(path: Path, *, is_first: bool) -> int:
    """More than at the last start, and than in any backup or copy of this folder: the seconds of the calendar.

    A device without a clock counts on by one.
    """
    try:
        before = int(path.read_text())
    except FileNotFoundError:
        before = 0
        if not is_first:
            _log.warning("the count of starts in %s is lost; counting on from the calendar", path)
    except ValueError:
        before = 0
        _log.warning("the count of starts in %s is damaged; counting on from the calendar", path)
    boot = max(before + 1, int(time.time()))
    write_durably(path, str(boot).encode(), PRIVATE_MODE)
    return boot


def renew(folder: Path) -> NodeId:
    """Makes the node of this folder another one: a new key, the old one kept beside it. Returns the new id.

    Raises `IdentityError`, also where there is no identity yet.
    """
    with claimed(folder) as old:
        path = folder / KEY_FILE
        try:
            path.replace(folder / f"{KEY_FILE}.{old.node_id[:8]}")
            return node_id_of(_make_key(path))
        except OSError as error:
            raise IdentityError(f"the data folder {folder} can't be written ({error.strerror or error})") from None
