"""How people name a model, which may be a path; and an instance: by its model, its id, or the beginning of its id."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from covey.checkpoints import mistaken
from covey.checkpoints.catalogue import HUB_PREFIX
from covey.cli.client import CliError
from covey.schema.cluster import Instance

BEGINNING_LEAST: Final = 4  # characters; fewer are a slip of the finger
SHORT_LEAST: Final = 8  # characters shown, so that most ids keep their short form when others come


def local_path(model: str) -> str:
    """A path is meant from where the command runs, and the node runs elsewhere."""
    is_path = model.endswith(".gguf") or "/" in model
    if model.startswith(HUB_PREFIX) or mistaken.is_address(model) or not is_path:
        return model
    return os.path.normpath(Path(model).expanduser().absolute())


def model_to_place(model: str) -> str:
    """The same. Raises `CliError` where there is no such file here, and its name looks like one of a hub's."""
    path = local_path(model)
    hint = mistaken.hub_hint(model)
    if hint and not Path(path).exists():
        raise CliError(f"{model}: there is no such file here; {hint}.")
    return path


def instances_of(instances: Sequence[Instance], model: str) -> list[Instance]:
    """Those that serve the model."""
    return [each for each in instances if each.card.model_id.casefold() == model.casefold()]


def short_ids(ids: Sequence[str]) -> dict[str, str]:
    """The shortest beginning of each instance's id that no other one has."""
    return {each: _short(each, [other for other in ids if other != each]) for each in ids}


def _short(instance_id: str, others: Sequence[str]) -> str:
    lengths = range(SHORT_LEAST, len(instance_id))
    found = (instance_id[:length] for length in lengths)
    return next((each for each in found if not any(other.startswith(each) for other in others)), instance_id)


def named_instance(instances: Sequence[Instance], name: str) -> Instance:
    """The one that is meant. Raises `CliError` unless that is one."""
    exactly = [each for each in instances if each.instance_id == name]
    found = exactly or instances_of(instances, name) or _beginning(instances, name)
    if len(found) == 1:
        return found[0]
    if found:
        raise CliError(f"'{name}' may mean {listed(found)}. Name one of them by more of its id.")
    if not instances:
        raise CliError(f"There is no instance '{name}': no model is placed.")
    raise CliError(f"There is no instance '{name}'; there are: {listed(instances)}.")


def _beginning(instances: Sequence[Instance], name: str) -> list[Instance]:
    return [each for each in instances if len(name) >= BEGINNING_LEAST and each.instance_id.startswith(name)]


def listed(instances: Sequence[Instance]) -> str:
    short = short_ids([each.instance_id for each in instances])
    return ", ".join(f"{short[each.instance_id]} ({each.card.model_id})" for each in instances)
