"""API keys as intent: which may be added, and which one a person means. Who may come in is `api/auth`'s to say."""

from collections.abc import Iterable
from typing import Final

from covey.schema.cluster import ApiKey, Refused

KEYS_MAX: Final = 256  # one per person or program of a household, many times over; each is some 100 bytes everywhere
CONFLICT: Final = 409
NOT_FOUND: Final = 404


def addition_refused(key: ApiKey, known: Iterable[ApiKey]) -> Refused | None:
    """Why `key` can't be added beside those `known`; None if it can."""
    names = [each.name for each in known]
    if key.name in names:
        return Refused(f"there is a key named '{key.name}' already: choose another name, or revoke that one.", CONFLICT)
    if len(names) >= KEYS_MAX:
        return Refused(f"there are {KEYS_MAX} keys, which is the limit: revoke one that nobody uses.", CONFLICT)
    return None


def find(wanted: str, known: Iterable[ApiKey]) -> ApiKey | Refused:
    """The key with the id or the name `wanted`. Two leaders, apart for a while, may have let one name in twice."""
    ordered = sorted(known, key=lambda each: each.key_id)
    found = [each for each in ordered if each.key_id == wanted] or [each for each in ordered if each.name == wanted]
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(each.key_id for each in found)
        return Refused(f"more than one key is named '{wanted}': revoke by id, which are {ids}.", CONFLICT)
    names = ", ".join(each.name for each in ordered) or "none"
    return Refused(f"there is no key '{wanted}'; there are: {names}.", NOT_FOUND)
