"""Brings an SQLite file to the layout that this version reads, step by step, with a copy of what was there before.

`user_version` of the file counts the steps it has behind it. Each step is one transaction, so that a crash leaves the
layout before it or after it. The table `about` holds the version of Covey that brought the file to its layout; all
layouts keep it, so that an older program can say which one to install.
"""

import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from covey.effects.durable import sync_folder

PRIVATE_MODE = 0o600


class NewerLayoutError(Exception):
    """The file has steps behind it that this program does not know. `covey_version` made them."""

    def __init__(self, covey_version: str) -> None:
        super().__init__(covey_version)
        self.covey_version = covey_version


def migrate(connection: sqlite3.Connection, path: Path, steps: Sequence[str], covey_version: str) -> Path | None:
    """Takes the steps that are missing; each is SQL. Returns the copy that was made before, if anything was there.

    Raises `NewerLayoutError`, `OSError`, `sqlite3.Error`.
    """
    done = layout(connection)
    if done > len(steps):
        raise NewerLayoutError(_version_that_fits(connection))
    copy = _copied(connection, path.with_name(f"{path.name}.layout-{done}")) if 0 < done < len(steps) else None
    for number, step in enumerate(steps[done:], start=done + 1):
        _take(connection, step, number, covey_version)
    return copy


def layout(connection: sqlite3.Connection) -> int:
    """How many steps the file has behind it; a new one none."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _take(connection: sqlite3.Connection, step: str, number: int, covey_version: str) -> None:
    quoted = covey_version.replace("'", "''")
    said = f"INSERT OR REPLACE INTO about VALUES ('covey_version', '{quoted}')"  # noqa: S608 - our own version, quoted
    try:
        connection.executescript(f"BEGIN; {step}; {said}; PRAGMA user_version = {number}; COMMIT")
    except sqlite3.Error:
        if connection.in_transaction:
            connection.rollback()
        raise


def _version_that_fits(connection: sqlite3.Connection) -> str:
    row = connection.execute("SELECT value FROM about WHERE name = 'covey_version'").fetchone()
    if row is None:
        raise sqlite3.DatabaseError("it does not say which version wrote it")
    return str(row[0])


def _copied(connection: sqlite3.Connection, target: Path) -> Path:
    """A whole copy, also of what lies in the write-ahead log. One of an earlier try is replaced."""
    fresh = target.with_name(f"{target.name}.new")
    fresh.unlink(missing_ok=True)
    os.close(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY, PRIVATE_MODE))
    with closing(sqlite3.connect(fresh)) as copy:
        connection.backup(copy)
    fresh.replace(target)
    sync_folder(target.parent)
    return target
