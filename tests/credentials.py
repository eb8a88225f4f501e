"""Nodes of one cluster, and strangers, each with what it shows: the same at every run."""

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from covey.control.join_code import JoinCode
from covey.effects.code_file import known_code
from covey.effects.identity import Identity, node_id_of
from covey.effects.trust import make_credentials
from covey.schema.trust import Credentials

CODE = JoinCode(bytes(range(16)))
OTHER_CODE = JoinCode(bytes(16))


def node(number: int) -> Identity:
    key = Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big"))
    return Identity(node_id_of(key), 1, key)


def credentials(number: int = 0, code: JoinCode = CODE) -> Credentials:
    """Of node `number`."""
    return make_credentials(code, node(number))


def credentials_in(home: Path, cluster: str = "", number: int = 5) -> Credentials:
    """Of node `number` in the cluster whose code lies under `home`."""
    code = known_code(home)
    assert code is not None
    return make_credentials(code, node(number), cluster)
