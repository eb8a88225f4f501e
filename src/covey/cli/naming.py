"""How people name a model, which may be a path; and an instance: by its model, by its id, or by its short id."""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit

from covey.checkpoints import mistaken
from covey.checkpoints.catalogue import HUB_PREFIX
from covey.cli.client import CliError
from covey.effects.addresses import is_local
from covey.schema.cluster import ClusterState, Instance, Wish
from covey.schema.model import ModelCard

BEGINNING_LEAST: Final = 4  # characters; fewer are a slip of the finger
SHORT_LEAST: Final = 8  # characters shown: of 1,000 instances, two would begin alike once in 8,000 clusters
INSTANCE_ID: Final = re.compile(r"\b[0-9a-f]{8}-\d+-\d+\.[0-9a-f]{8}-\d+-\d+\b")  # as control/ and node.py make it

Asked = TypeVar("Asked", bound=Instance | Wish)


def local_path(model: str) -> str:
    """A path is meant from where the command runs, and the node runs elsewhere."""
    is_path = model.endswith(".gguf") or "/" in model
    if model.startswith(HUB_PREFIX) or mistaken.is_address(model) or not is_path:
        return model
    return os.path.abspath(os.path.expanduser(model))  # noqa: PTH100, PTH111 - those of pathlib raise for unknown users


def model_to_place(model: str, url: str) -> str:
    """The same. Raises `CliError` where the node at `url` is on this machine, there is no such file, and its name
    looks like one of a hub's. A node elsewhere looks for the file there, and says what it found.
    """
    path, hint = local_path(model), mistaken.hub_hint(model)
    is_here = is_local(urlsplit(url).hostname or "")
    if hint and is_here and not _exists(path, model):
        raise CliError(f"{model}: there is no such file here; {hint}.")
    return path


def _exists(path: str, model: str) -> bool:
    try:
        return Path(path).exists()
    except OSError as error:  # a folder that is not ours to enter, a name that is too long
        raise CliError(f"{model} can't be looked at ({error.strerror}): check the path.") from None


def asked_for(state: ClusterState) -> list[Instance | Wish]:
    """What can be stopped: the instances, and the wishes that wait for a place."""
    served = {each.wish_id for each in state.instances}
    return [*state.instances, *(each for each in state.wishes if each.wish_id not in served)]


def id_of(asked: Instance | Wish) -> str:
    return asked.instance_id if isinstance(asked, Instance) else asked.wish_id


def instances_of(instances: Sequence[Asked], model: str) -> list[Asked]:
    """Those that serve the model, or will."""
    return [each for each in instances if is_of(each, model)]


def is_of(asked: Instance | Wish, model: str) -> bool:
    return is_named(asked.card, model)


def is_named(card: ModelCard, model: str) -> bool:
    return card.model_id.casefold() == model.casefold()


def short_ids(ids: Sequence[str]) -> dict[str, str]:
    """What each instance is called: the first digits of its id's hash, as many as tell these apart. So it keeps its
    name while others come and go; the ids themselves are long, and begin alike.
    """
    return {each: _short(each, [other for other in ids if other != each]) for each in ids}


def _short(instance_id: str, others: Sequence[str]) -> str:
    digest, taken = _digest(instance_id), [_digest(other) for other in others]
    found = (digest[:length] for length in range(SHORT_LEAST, len(digest)))
    return next((each for each in found if not any(other.startswith(each) for other in taken)), digest)


def _digest(instance_id: str) -> str:
    return hashlib.sha256(instance_id.encode()).hexdigest()


def with_short_ids(text: str) -> str:
    """A sentence of a node's for a person, with the short form of each instance's id in it."""
    return INSTANCE_ID.sub(lambda found: _digest(found[0])[:SHORT_LEAST], text)


def named_instance(instances: Sequence[Asked], name: str) -> Asked:
    """The one that is meant. Raises `CliError` unless that is one."""
    exactly = [each for each in instances if id_of(each) == name]
    found = exactly or instances_of(instances, name) or _beginning(instances, name)
    if len(found) == 1:
        return found[0]
    if found:
        raise CliError(f"'{name}' may mean {listed(found)}. Name one of them by more of its id.")
    if not instances:
        raise CliError(f"There is no instance '{name}': no model is placed.")
    raise CliError(f"There is no instance '{name}'; there are: {listed(instances)}.")


def _beginning(instances: Sequence[Asked], name: str) -> list[Asked]:
    return [
        each for each in instances if len(name) >= BEGINNING_LEAST and _digest(id_of(each)).startswith(name.lower())
    ]


def listed(instances: Sequence[Instance | Wish]) -> str:
    short = short_ids([id_of(each) for each in instances])
    return ", ".join(f"{short[id_of(each)]} ({each.card.model_id})" for each in instances)
