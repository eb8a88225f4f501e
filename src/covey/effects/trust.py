"""What follows from a join code: the cluster's certificate authority, its name on the network, a node's credentials.

Everything but the node's certificate is derived by HKDF-SHA256 (RFC 5869) with a label of its own, so that a node
that holds the code needs nobody else, and one thing that is shown tells nothing about the rest.
Certificates are valid from 1970 to 9999: a device may have no clock. What ends trust is a new code.
"""

import datetime as dt
import hashlib
import secrets
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from covey.control.join_code import SECRET_BYTES, JoinCode
from covey.effects.identity import Identity
from covey.schema.trust import Credentials

SALT: Final = b"covey trust 1"
SEED_BYTES: Final = 32
CLUSTER_ID_BYTES: Final = 8
SCOUTING_PORT_FIRST: Final = 20000  # below the ranges that systems hand out to outgoing connections
SCOUTING_PORT_COUNT: Final = 10000
AUTHORITY_SERIAL: Final = 1
VALID_FROM: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
VALID_UNTIL: Final = dt.datetime(9999, 12, 31, 23, 59, 59, tzinfo=dt.UTC)
OPEN_CODE: Final = JoinCode(hashlib.sha256(b"covey open cluster").digest()[:SECRET_BYTES])  # everybody's


def new_join_code() -> JoinCode:
    return JoinCode(secrets.token_bytes(SECRET_BYTES))


def make_credentials(code: JoinCode, mine: Identity, cluster: str = "") -> Credentials:
    """What the node `mine` shows in the cluster of `code`. `cluster` tells apart clusters of one code."""
    signer = authority_key(code, cluster)
    cluster_id = cluster_id_of(code, cluster)
    group, port = scouting_of(code, cluster)
    authority = _authority(signer, cluster_id)
    return Credentials(
        authority=authority.public_bytes(Encoding.PEM),
        certificate=_certificate(mine, authority, signer).public_bytes(Encoding.PEM),
        private_key=mine.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        cluster_id=cluster_id,
        scouting_group=group,
        scouting_port=port,
        mesh_key=derive(code, "mesh", cluster, SEED_BYTES),
    )


def cluster_id_of(code: JoinCode, cluster: str = "") -> str:
    """16 hex digits, safe to show."""
    return derive(code, "cluster id", cluster, CLUSTER_ID_BYTES).hex()


def authority_of(code: JoinCode, cluster: str = "") -> bytes:
    """The certificate by which its members are known, in PEM."""
    return _authority(authority_key(code, cluster), cluster_id_of(code, cluster)).public_bytes(Encoding.PEM)


def scouting_of(code: JoinCode, cluster: str = "") -> tuple[str, int]:
    """Where its nodes look for one another: a multicast group (RFC 2365: never leaves the site), and a UDP port."""
    scouting = derive(code, "scouting", cluster, 4)
    group = f"239.255.{scouting[0]}.{scouting[1]}"
    return group, SCOUTING_PORT_FIRST + int.from_bytes(scouting[2:], "big") % SCOUTING_PORT_COUNT


def authority_key(code: JoinCode, cluster: str = "") -> Ed25519PrivateKey:
    """Whoever has it can make members."""
    return Ed25519PrivateKey.from_private_bytes(derive(code, "certificate authority", cluster, SEED_BYTES))


def derive(code: JoinCode, label: str, cluster: str, length: int) -> bytes:
    info = f"{label}\0{cluster}".encode()
    return HKDF(SHA256(), length, SALT, info).derive(code.secret)


def _authority(key: Ed25519PrivateKey, cluster_id: str) -> x509.Certificate:
    """The same bytes on every node: Ed25519 signatures have no randomness, and neither has anything else in it."""
    name = _name(f"covey cluster {cluster_id}")
    builder = _builder(name, name, key.public_key(), AUTHORITY_SERIAL, _usage(is_authority=True))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return builder.sign(key, None)


def _certificate(mine: Identity, authority: x509.Certificate, signer: Ed25519PrivateKey) -> x509.Certificate:
    """For both roles of TLS: every node listens and connects."""
    public = mine.key.public_key()
    serial = x509.random_serial_number()
    builder = _builder(_name(mine.node_id), authority.subject, public, serial, _usage(is_authority=False))
    roles = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    for extension, is_critical in (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (x509.ExtendedKeyUsage(roles), False),
        (x509.SubjectAlternativeName([x509.DNSName(mine.node_id)]), False),
        (x509.SubjectKeyIdentifier.from_public_key(public), False),
        (issuer, False),
    ):
        builder = builder.add_extension(extension, critical=is_critical)
    return builder.sign(signer, None)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: Ed25519PublicKey, serial: int, usage: x509.KeyUsage
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(issuer, subject, key, serial, VALID_FROM, VALID_UNTIL)
    return builder.add_extension(usage, critical=True)


def _usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
