"""What a person probably meant who named no model: the name of a listed one, or a file on the Hugging Face hub."""

import difflib
import re
from collections.abc import Sequence
from typing import Final

_BEGINNING_LEAST: Final = 4  # characters that say which name was meant
_ADDRESS: Final = re.compile(r"[a-z][a-z0-9+.-]*://|(www\.)?(huggingface\.co|hf\.co)/", re.IGNORECASE)
_HUB_ADDRESS: Final = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<path>[^?#]*).*", re.IGNORECASE
)
_HUB_FILE: Final = re.compile(r"(?P<repository>[^/]+/[^/]+)/(?:resolve|blob|raw)/(?P<revision>[^/]+)/(?P<file>.+)")
_HUB_REPOSITORY: Final = re.compile(r"(?P<repository>[^/]+/[^/]+)(?:/.*)?")
_LIKE_ON_HUB: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?P<file>/.+\.gguf)?", re.IGNORECASE)
_ANY_FILE: Final = "hf:OWNER/REPO/FILE.gguf"


def near(name: str, known: Sequence[str]) -> str:
    """The one of the `known` names that begins so, or is written nearly so; "" if none is."""
    wanted, folded = name.casefold(), {each.casefold(): each for each in known}
    longer = [each for key, each in folded.items() if len(name) >= _BEGINNING_LEAST and key.startswith(wanted)]
    alike = [folded[key] for key in difflib.get_close_matches(wanted, folded, n=1)]
    return next(iter([*longer, *alike]), "")


def is_address(name: str) -> bool:
    """Whether it is a URL, also one of the hub without its scheme: never a path."""
    return _ADDRESS.match(name) is not None


def address_hint(address: str) -> str:
    """How what lies at an address is named."""
    on_hub = _HUB_ADDRESS.fullmatch(address)
    if on_hub is None:
        return "fetch the file and name its path"
    if file := _HUB_FILE.fullmatch(on_hub["path"]):
        revision = "" if file["revision"] == "main" else f"@{file['revision']}"
        return f"name it as hf:{file['repository']}/{file['file']}{revision}"
    repository = _HUB_REPOSITORY.fullmatch(on_hub["path"])
    return f"name one of its files as {_any_file_of(repository['repository']) if repository else _ANY_FILE}"


def hub_hint(name: str) -> str:
    """For a file that is not there: how it is named if the hub's was meant; "" if the name is not like one of a hub."""
    like = _LIKE_ON_HUB.fullmatch(name)
    if like is None:
        return ""
    is_whole, is_repository = like["file"] is not None, not name.lower().endswith(".gguf")
    named = f"hf:{name}" if is_whole else _any_file_of(name) if is_repository else _ANY_FILE
    return f"a file of the Hugging Face hub is named {named}"


def _any_file_of(repository: str) -> str:
    return f"hf:{repository}/FILE.gguf"
