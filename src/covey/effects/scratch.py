"""Folders for as long as a process lives: those of processes that were killed are removed by the next one."""

import logging
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from covey.effects.durable import LockedError, locked
from covey.effects.paths import make_private

LOCK: Final = ".lock"  # beside its folder, and taken before there is one: a folder whose lock is free is nobody's

_log = logging.getLogger(__name__)


@contextmanager
def folder(parent: Path) -> Generator[Path]:
    """A fresh folder in `parent`, removed at the end. Raises `OSError`."""
    remove_leftovers(make_private(parent))
    mine = parent / secrets.token_hex(4)
    with locked(mine.with_suffix(LOCK)):
        make_private(mine)
        try:
            yield mine
        finally:
            _remove(mine)


def remove_leftovers(parent: Path) -> None:
    """Removes the folders of processes that are gone, as far as that can be done now."""
    for left in [each for each in parent.iterdir() if each.is_dir()]:
        try:
            with suppress(LockedError), locked(left.with_suffix(LOCK)):  # else it is in use
                _remove(left)
        except OSError as error:  # what a killed process started may still be writing there; the next one tries again
            _log.info("%s is left over and can't be removed: %s", left, error)


def _remove(mine: Path) -> None:
    """The lock's file goes last, so that whoever finds the folder finds the lock taken."""
    if mine.exists():
        shutil.rmtree(mine)
    mine.with_suffix(LOCK).unlink(missing_ok=True)
