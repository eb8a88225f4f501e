"""Where things lie on this machine: one folder for all data of a user, one folder a node, one for model files.

`COVEY_HOME` moves everything; otherwise the platform's own place (XDG on Linux, Application Support on macOS).
"""

import os
from pathlib import Path
from typing import Final

import platformdirs

FOLDER_MODE: Final = 0o700  # keys and prompts in logs are nobody else's business


def home() -> Path:
    """The folder that holds all data of this user."""
    chosen = os.environ.get("COVEY_HOME")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return platformdirs.user_data_path("covey", appauthor=False)


def models_folder() -> Path:
    """Model files; shared by all nodes of one user, since several of them may run on one machine."""
    return home() / "models"


def node_folder(data_dir: Path | None = None) -> Path:
    """What belongs to one node: its identity, its lock, its logs. `data_dir` is what a person chose."""
    return home() / "node" if data_dir is None else data_dir.expanduser().absolute()


def make_private(folder: Path) -> Path:
    """The folder, made if it was missing, and those above it. Raises `OSError`."""
    if not folder.parent.exists():
        make_private(folder.parent)
    folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
    return folder
