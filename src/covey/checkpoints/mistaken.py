"""What a person probably meant who named no model: the name of a listed one, or a file on the Hugging Face hub."""

import difflib
import re
from collections.abc import Sequence
from typing import Final
from urllib.parse import unquote

_BEGINNING_LEAST: Final = 4  # characters that say which name was meant
_ALIKE_LEAST: Final = 0.9  # of 1, as difflib counts: a letter or two of a name are wrong
_NUMBER: Final = re.compile(r"\d+")
_ADDRESS: Final = re.compile(r"[a-z][a-z0-9+.-]*://|(www\.)?(huggingface\.co|hf\.co)/", re.IGNORECASE)
_HUB_ADDRESS: Final = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<path>[^?#:]*).*", re.IGNORECASE
)  # what follows a colon is how other programs name a quantization
_HUB_FILE: Final = re.compile(r"(?P<repository>[^/]+/[^/]+)/(?:resolve|blob|raw)/(?P<revision>[^/]+)/(?P<file>.+)")
_FILE_ON_HUB: Final = re.compile(r"[\w./+=-]+\.gguf(@[\w./-]+)?", re.ASCII | re.IGNORECASE)
_LOCAL_FILE: Final = re.compile(r"file://(?:localhost)?(?P<path>/.+)", re.IGNORECASE)
_HUB_REPOSITORY: Final = re.compile(r"(?P<repository>[^/]+/[^/]+)(?:/.*)?")
_LIKE_ON_HUB: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?P<file>/.+\.gguf)?", re.IGNORECASE)
_ANY_FILE: Final = "hf:OWNER/REPO/FILE.gguf"


def guess(name: str, known: Sequence[str]) -> str:
    """Whether one of the `known` names was meant, as a question behind what is wrong; "" if nobody can tell.

    It is one that begins so, or was missed by a slip of the keyboard. With other numbers in it, a name is one of
    another model: of another size, or another version.
    """
    wanted, folded = name.casefold(), {each.casefold(): each for each in known}
    longer = [each for key, each in folded.items() if len(name) >= _BEGINNING_LEAST and key.startswith(wanted)]
    same = [key for key in folded if _NUMBER.findall(key) == _NUMBER.findall(wanted)]
    alike = [folded[key] for key in difflib.get_close_matches(wanted, same, n=1, cutoff=_ALIKE_LEAST)]
    return next((f" (did you mean {each}?)" for each in [*longer, *alike]), "")


def is_address(name: str) -> bool:
    """Whether it is a URL, also one of the hub without its scheme: never a path."""
    return _ADDRESS.match(name) is not None


def address_hint(address: str) -> str:
    """How what lies at an address is named."""
    on_hub, local = _HUB_ADDRESS.fullmatch(address), _LOCAL_FILE.fullmatch(address)
    path = unquote(local["path"]) if local else ""
    if on_hub is None:
        return f"name it as {path}" if path and path.isprintable() else "fetch the file and name its path"
    if named := _file_at(on_hub["path"]):
        return f"name it as hf:{named}"
    repository = _HUB_REPOSITORY.fullmatch(on_hub["path"])
    return f"name one of its files as {_any_file_of(repository['repository']) if repository else _ANY_FILE}"


def _file_at(path: str) -> str:
    """What a path on the hub, in which a slash of a revision is written %2F, leads to; "" if it is no model's file."""
    found = _HUB_FILE.fullmatch(path)
    if found is None:
        return ""
    repository, revision, file = (unquote(each) for each in found.groups())
    named = f"{repository}/{file}" + ("" if revision == "main" else f"@{revision}")
    return named if _FILE_ON_HUB.fullmatch(named) else ""


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
