"""API keys: how one is made, shown once, and known again. Pure, but for the random bytes that the caller brings.

A key is `covey_<id>_<secret>`. The cluster keeps a salted SHA-256 of the secret, and no slow password hash: a slow hash
makes guessing dear where people choose, and this secret is 160 random bits, which nobody can guess, however fast the
hash. It would only make every request dear. The salt keeps two clusters' hashes of one key from being compared.
"""

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final

from pydantic import AfterValidator

from covey.api.body import DialectBody, fields, json_object
from covey.api.errors import RequestError
from covey.schema.cluster import ApiKey

PREFIX: Final = "covey"
ID_BYTES: Final = 6
SECRET_BYTES: Final = 20
SALT_BYTES: Final = 16
ENTROPY_BYTES: Final = ID_BYTES + SECRET_BYTES + SALT_BYTES
NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@ -]{0,63}")
KEY_PATTERN: Final = re.compile(rf"{PREFIX}_([0-9a-f]{{{2 * ID_BYTES}}})_([0-9a-f]{{{2 * SECRET_BYTES}}})", re.ASCII)

_NO_SALT: Final = bytes(SALT_BYTES)


def checked_name(name: str) -> str:
    """Raises `ValueError`. A name stands in the log, in sentences and in addresses."""
    if not NAME_PATTERN.fullmatch(name):
        raise ValueError(
            "must have 1 to 64 letters, digits, spaces or any of . _ @ -, and begin with a letter or a digit"
        )
    return name


class KeyBody(DialectBody):
    """What `POST /keys` is told."""

    name: Annotated[str, AfterValidator(checked_name)]


def parse_key(body: bytes) -> str:
    """The name of the key to add. Raises `RequestError`."""
    return fields(KeyBody, json_object(body)).name


def made(name: str, entropy: bytes, created_s: int) -> tuple[ApiKey, str]:
    """A new key, and what to show of it once. `entropy`: `ENTROPY_BYTES` that nobody can foresee."""
    assert len(entropy) == ENTROPY_BYTES, "that many random bytes"
    key_id = entropy[:ID_BYTES].hex()
    secret = entropy[ID_BYTES : ID_BYTES + SECRET_BYTES].hex()
    salt = entropy[-SALT_BYTES:]
    key = ApiKey(key_id=key_id, name=name, salt=salt, digest=digest(salt, secret), created_s=created_s)
    return key, f"{PREFIX}_{key_id}_{secret}"


def digest(salt: bytes, secret: str) -> bytes:
    return hashlib.sha256(salt + secret.encode()).digest()


def known(shown: str, keys: Iterable[ApiKey]) -> ApiKey | None:
    """The key that `shown` is. What is compared with a secret takes the same time, right or wrong."""
    match = KEY_PATTERN.fullmatch(shown)
    if match is None:
        return None
    key = next((each for each in keys if each.key_id == match[1]), None)
    computed = digest(key.salt if key else _NO_SALT, match[2])
    return key if key and hmac.compare_digest(computed, key.digest) else None


def shown_key(headers: Mapping[str, str]) -> str | None:
    """The key that a request shows: `Authorization: Bearer KEY`, or `x-api-key: KEY` as Anthropic's clients do."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return credentials.strip()
    return headers.get("x-api-key")


def admitted(headers: Mapping[str, str], keys: Iterable[ApiKey]) -> ApiKey:
    """The key that lets the request in. Raises `RequestError` 401 with what to do."""
    shown = shown_key(headers)
    if shown is None:
        raise _unauthorized(
            "This node asks for an API key: send 'Authorization: Bearer KEY' or 'x-api-key: KEY'."
            " `covey keys add NAME`, run on the node's own machine, makes one."
        )
    key = known(shown, keys)
    if key is None:
        raise _unauthorized("The API key is not valid, or was revoked. `covey keys list` lists the valid ones by name.")
    return key


def _unauthorized(sentence: str) -> RequestError:
    return RequestError(sentence, status=401, headers={"WWW-Authenticate": 'Bearer realm="covey"'})


def render_key(key: ApiKey) -> dict[str, Any]:
    """What may be shown of it at any time."""
    return {"key_id": key.key_id, "name": key.name, "created_s": key.created_s}
