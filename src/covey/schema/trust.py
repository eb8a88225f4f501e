"""What a node shows to prove that it belongs to its cluster."""

import hashlib
from typing import Final

from msgspec import Struct

from covey.schema.ids import NodeId

NODE_ID_LENGTH: Final = 32


class Credentials(Struct, frozen=True, kw_only=True):
    """For mutual TLS between the nodes of one cluster. Everything here is derived from the join code, or signed by it.

    The certificate's subject is the node's id, which is the hash of its public key; whoever connects compares the two.
    """

    authority: bytes  # PEM: the cluster's certificate authority, the same bytes on every node
    certificate: bytes  # PEM: this node's, signed by the authority
    private_key: bytes  # PEM, PKCS 8: belongs to the certificate; never leaves this machine
    cluster_id: str  # 16 hex digits, safe to show: tells clusters apart, and prefixes the keys of the mesh
    scouting_group: str  # IPv4 multicast address of this cluster's discovery
    scouting_port: int
    mesh_key: bytes  # 32: seals messages on the mesh, inside its TLS

    def __repr__(self) -> str:
        """Without the key, so that no log shows it."""
        return f"Credentials(cluster_id={self.cluster_id!r}, …)"


class RotationOutcome(Struct, frozen=True):
    """Who has the new join code, and who stays but has to be told it by a person; and the API keys, by name."""

    reached: tuple[NodeId, ...]
    missed: tuple[NodeId, ...]
    keys_revoked: tuple[str, ...] = ()  # all of them, if somebody was shut out
    keys_valid: tuple[str, ...] = ()  # else they stay


def node_id_of(public_key: bytes) -> NodeId:
    """The id of the node whose Ed25519 public key (32 raw bytes) this is."""
    return NodeId(hashlib.sha256(public_key).hexdigest()[:NODE_ID_LENGTH])
