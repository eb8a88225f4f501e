"""Intent on this node's disk: one SQLite file that holds the map itself, so it is as large as what exists.

What `keep` has returned from would outlive a power cut. Nothing is written while nothing changes. A file that is
damaged is put aside, with a mark of the time in its name, and a new one begun: the other nodes have the map too. A
file of a newer version is left alone.
"""

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Final

from msgspec import Struct

from covey.effects.durable import sync_folder
from covey.effects.migration import PRIVATE_MODE, NewerLayoutError, migrate
from covey.schema.cluster import Entry, Version
from covey.schema.ids import NodeId

FILE: Final = "intent.sqlite"
COMPANIONS: Final = ("", "-wal", "-shm", "-journal")  # what SQLite lays beside a file, by the end of its name
ASIDE_MAX: Final = 3  # damaged files that are kept, the newest
TOMBSTONE_S_MAX: Final = 90 * 24 * 3600
PLAUSIBLE_S: Final = 1_735_689_600  # 2025: a clock that says less was never set
WAL_PAGES: Final = 100  # of 4 KiB: the write-ahead log is folded into the file at this length ...
WAL_BYTES_MAX: Final = 512 * 1024  # ... and cut to this one when it was longer once

# Each brings the file one layout further. A step that was released is never changed.
STEPS: Final = (
    """
    CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE entries (
        key TEXT PRIMARY KEY,
        value BLOB,  -- msgpack; NULL: deleted
        counter INTEGER NOT NULL,
        writer TEXT NOT NULL,
        deleted_s INTEGER  -- Unix time when this node heard of the deletion; 0: its clock was not set
    ) WITHOUT ROWID
    """,
)
# Where deletions have no time they get it now. (A clock that was set meanwhile may stand anywhere.)
DATE: Final = "UPDATE entries SET deleted_s = ? WHERE deleted_s = 0"
# Deletions up to this one are all old enough: the next younger one bounds them.
FORGET: Final = """
    SELECT max(counter) FROM entries WHERE value IS NULL
    AND counter < coalesce((SELECT min(counter) FROM entries WHERE value IS NULL AND deleted_s >= ?), 1 << 62)
"""
KEEP: Final = "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?)"
DROP: Final = "DELETE FROM entries WHERE key = ?"
WORLDS_FAULT: Final = frozenset({
    sqlite3.SQLITE_AUTH, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY,
})  # fmt: skip  # whose file is whole as far as anybody knows

_log = logging.getLogger(__name__)


class StoreError(Exception):
    """What people asked for can't be read or kept; the message is one sentence for a person."""


class Restored(Struct, frozen=True):
    """What the disk held at the start. `forget_until`: deletions up to this counter are older than 90 days."""

    entries: dict[str, Entry]
    forget_until: int


class Store:
    """An open file. `restored` is what it held when it was opened."""

    def __init__(self, path: Path, covey_version: str, calendar_s: Callable[[], float]) -> None:
        self._path = path
        self._calendar_s = calendar_s
        self._lock = Lock()
        self._connection = _connected(path)
        try:
            migrate(self._connection, path, STEPS, covey_version)
            self.restored = self._restore()
        except BaseException:
            self.close()
            raise
        sync_folder(path.parent)

    def keep(self, entries: Mapping[str, Entry | None]) -> None:
        """Writes all of it, durably, or nothing; None drops a key. May wait for the disk. Raises `StoreError`."""
        now_s = self._now_s()
        rows = [_row(key, entry, now_s) for key, entry in entries.items() if entry]
        dropped = [(key,) for key, entry in entries.items() if entry is None]
        with self._lock:
            try:
                with self._connection:  # one transaction, undone where it fails
                    self._connection.executemany(KEEP, rows)
                    self._connection.executemany(DROP, dropped)
            except sqlite3.Error as error:
                raise StoreError(
                    f"nothing can be kept in {self._path} ({error}), so it would not outlive a restart; free some "
                    "space on that disk, or check its permissions"
                ) from None

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _restore(self) -> Restored:
        now_s = self._now_s()
        if now_s and self._connection.execute("SELECT 1 FROM entries WHERE deleted_s = 0").fetchone():
            with self._connection:
                self._connection.execute(DATE, (now_s,))
        rows = self._connection.execute("SELECT key, value, counter, writer FROM entries").fetchall()
        entries = {key: Entry(value, Version(counter, NodeId(writer))) for key, value, counter, writer in rows}
        oldest_s = now_s - TOMBSTONE_S_MAX
        forget_until = self._connection.execute(FORGET, (oldest_s,)).fetchone()[0] if now_s else None
        return Restored(entries, forget_until or 0)

    def _now_s(self) -> int:
        """The calendar's seconds; 0 where the clock was never set."""
        now_s = int(self._calendar_s())
        return now_s if now_s >= PLAUSIBLE_S else 0


@contextmanager
def opened(folder: Path, covey_version: str, calendar_s: Callable[[], float] = time.time) -> Generator[Store]:
    """The store in `folder`, made at the first start, closed at the end of the block. Raises `StoreError`."""
    path = folder / FILE
    try:
        store = _open(path, covey_version, calendar_s)
    except NewerLayoutError as error:
        raise StoreError(
            f"what people asked for lies in {path} as Covey {error.covey_version} wrote it, which this one, "
            f"{covey_version}, can't read; install Covey {error.covey_version} or a newer one"
        ) from None
    except (OSError, sqlite3.Error) as error:
        raise StoreError(
            f"{path}, where this node keeps what people asked for, can't be used ({error}); "
            "check its permissions and the free space, or choose another folder with --data-dir"
        ) from None
    try:
        yield store
    finally:
        store.close()


def _open(path: Path, covey_version: str, calendar_s: Callable[[], float]) -> Store:
    try:
        return Store(path, covey_version, calendar_s)
    except sqlite3.Error as error:
        if not _is_damage(error):
            raise
        aside = _put_aside(path, calendar_s)
        _log.warning(
            "what this node had kept of people's wishes is damaged (%s) and lies in %s now; it starts without, and "
            "other nodes give it back what they have",
            error,
            aside,
        )
        return Store(path, covey_version, calendar_s)


def _connected(path: Path) -> sqlite3.Connection:
    """Raises `OSError`, `sqlite3.Error`; the latter also where the content is damaged."""
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, PRIVATE_MODE))
    path.chmod(PRIVATE_MODE)
    is_new = path.stat().st_size == 0
    connection = sqlite3.connect(path, check_same_thread=False)
    try:
        if is_new:  # said of a file that exists, it would be written there each time
            connection.execute("PRAGMA auto_vacuum = FULL")
        _prepare(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection) -> None:
    """`EXCLUSIVE` spares the shared memory file; `fullfsync` is what a Mac needs to reach the disk itself."""
    for pragma in (
        "locking_mode = EXCLUSIVE",
        "journal_mode = WAL",
        "synchronous = FULL",
        "fullfsync = ON",
        f"wal_autocheckpoint = {WAL_PAGES}",
        f"journal_size_limit = {WAL_BYTES_MAX}",
    ):
        connection.execute(f"PRAGMA {pragma}")
    answer = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if answer != "ok":
        raise sqlite3.DatabaseError(" ".join(answer.split()))


def _is_damage(error: sqlite3.Error) -> bool:
    """The primary code is in the low byte; an error without one is about what was read (text that is none)."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return code is None or code & 0xFF not in WORLDS_FAULT


def _put_aside(path: Path, calendar_s: Callable[[], float]) -> Path:
    """Keeps the newest few, whatever happens how often."""
    mark = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(calendar_s()))
    aside = path.with_name(f"{path.name}.damaged-{mark}")
    for ending in COMPANIONS:
        part = path.with_name(path.name + ending)
        if part.exists():
            part.replace(aside.with_name(aside.name + ending))
    former = sorted(path.parent.glob(f"{path.name}.damaged-*Z"), key=lambda each: each.name)
    for old in former[:-ASIDE_MAX]:
        for ending in COMPANIONS:
            old.with_name(old.name + ending).unlink(missing_ok=True)
    sync_folder(path.parent)
    return aside


def _row(key: str, entry: Entry, now_s: int) -> tuple[str, bytes | None, int, str, int | None]:
    deleted_s = now_s if entry.value is None else None
    return key, entry.value, entry.version.counter, entry.version.writer, deleted_s
