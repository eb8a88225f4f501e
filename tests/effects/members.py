"""Credentials of members of a cluster, as they are made from a join code."""

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from covey.control.join_code import JoinCode
from covey.effects import trust
from covey.effects.identity import Identity, node_id_of
from covey.schema.trust import Credentials

CODE, OTHER_CODE = JoinCode(bytes(16)), JoinCode(bytes(range(16)))


def credentials(code: JoinCode = CODE, cluster: str = "") -> Credentials:
    key = Ed25519PrivateKey.generate()
    return trust.make_credentials(code, Identity(node_id_of(key), 1, key), cluster)
