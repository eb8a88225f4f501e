"""Intent on a real disk: it survives kill -9, a full disk changes nothing, and a damaged file stops nobody."""

import errno
import logging
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from covey.effects import store
from covey.effects.migration import NewerLayoutError, layout, migrate
from covey.effects.store import FILE, STEPS, Store, StoreError, opened
from covey.schema.cluster import Entry, Version
from covey.schema.ids import NodeId

ADA = NodeId("a" * 32)
NOW_S = 1_800_000_000
DAY_S = 24 * 3600


def living(counter: int, value: bytes = b"\xa1x") -> Entry:
    return Entry(value, Version(counter, ADA))


def deleted(counter: int) -> Entry:
    return Entry(None, Version(counter, ADA))


def contents(folder: Path, now_s: float = NOW_S) -> dict[str, Entry]:
    with opened(folder, "1.0", lambda: now_s) as opened_store:
        return opened_store.restored.entries


def forgettable(folder: Path, now_s: float) -> int:
    with opened(folder, "1.0", lambda: now_s) as opened_store:
        return opened_store.restored.forget_until


# ---- what is kept ----


def test_what_was_kept_is_there_after_the_next_start_byte_for_byte(tmp_path: Path) -> None:
    odd = living(2**53, bytes(range(256)))
    with opened(tmp_path, "1.0") as first:
        assert first.restored.entries == {}
        first.keep({"wish/a": living(1), "quota/ä": odd, "wish/b": living(2)})
        first.keep({"wish/a": deleted(3), "wish/b": None})
    assert contents(tmp_path) == {"wish/a": deleted(3), "quota/ä": odd}


def test_only_its_owner_can_read_it(tmp_path: Path) -> None:
    with opened(tmp_path, "1.0") as first:
        first.keep({"wish/a": living(1)})
        assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
            FILE: 0o600,
            f"{FILE}-wal": 0o600,
        }
    (tmp_path / FILE).chmod(0o644)  # copied back from a backup
    contents(tmp_path)
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


def test_the_file_shrinks_with_what_exists(tmp_path: Path) -> None:
    path = tmp_path / FILE
    with opened(tmp_path, "1.0") as first:
        for start in range(0, 5_000, 500):
            first.keep({f"wish/{number}": living(number, bytes(1_000)) for number in range(start, start + 500)})
        assert sum(each.stat().st_size for each in tmp_path.iterdir()) > 5_000_000
        first.keep(dict.fromkeys((f"wish/{number}" for number in range(5_000)), None))
    assert path.stat().st_size < 50_000
    assert not path.with_name(f"{FILE}-wal").exists()


def test_nothing_is_written_while_nothing_changes(tmp_path: Path) -> None:
    with opened(tmp_path, "1.0") as first:
        first.keep({"wish/a": living(1)})
        before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        first.keep({})
        assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    contents(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---- deletions and clocks ----


def test_deletions_are_old_after_90_days_up_to_the_first_that_is_not(tmp_path: Path) -> None:
    with opened(tmp_path, "1.0", lambda: NOW_S) as first:
        first.keep({"wish/a": deleted(1), "wish/b": deleted(5)})
    with opened(tmp_path, "1.0", lambda: NOW_S + 50 * DAY_S) as second:
        second.keep({"wish/c": deleted(3), "wish/d": deleted(6), "wish/e": living(7)})
    for day, until in ((89, 0), (91, 1), (139, 1), (141, 6)):
        assert forgettable(tmp_path, NOW_S + day * DAY_S) == until
    assert forgettable(tmp_path, NOW_S + 90 * DAY_S - 600) == 0  # ten minutes off is ten minutes off, no more
    assert len(contents(tmp_path, NOW_S + 141 * DAY_S)) == 5  # what is forgotten is for the leader to say


def test_a_clock_of_1970_makes_no_deletion_old(tmp_path: Path) -> None:
    """A small board without a battery: its clock is set minutes after its start, or never."""
    with opened(tmp_path, "1.0", lambda: 60) as first:
        first.keep({"wish/a": deleted(1)})
    assert forgettable(tmp_path, 120) == 0
    assert forgettable(tmp_path, NOW_S) == 0  # its 90 days begin now
    assert forgettable(tmp_path, NOW_S + 91 * DAY_S) == 1
    assert forgettable(tmp_path, 60) == 0
    assert forgettable(tmp_path, NOW_S - 400 * DAY_S) == 0


# ---- accidents ----

WRITER = """
import sys
from pathlib import Path
from covey.effects.store import opened
from covey.schema.cluster import Entry, Version
with opened(Path(sys.argv[1]), "1.0") as store:
    number = max((entry.version.counter for entry in store.restored.entries.values()), default=0)
    while True:
        number += 1
        entry = Entry(number.to_bytes(4) * 500, Version(number, "a" * 32))
        store.keep({f"wish/{number % 50}": entry, f"instance/{number % 50}": entry})
        print(number, flush=True)
"""


def test_kill_9_in_the_middle_of_writing_loses_nothing_that_was_acknowledged_and_halves_nothing(tmp_path: Path) -> None:
    for round_number in range(8):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(5 + 7 * round_number)]
        process.kill()
        rest, _ = process.communicate(timeout=20)
        acknowledged = int([*lines, *rest.splitlines()][-1] if rest.endswith("\n") or not rest else lines[-1])
        entries = contents(tmp_path)
        counters = sorted(entry.version.counter for entry in entries.values())
        assert counters[-1] in {acknowledged, acknowledged + 1}
        assert len(counters) == 2 * min(50, counters[-1])
        assert counters == sorted(list(range(counters[-1], 0, -1))[:50] * 2)  # both of a batch, or neither
        assert all(entry.value == entry.version.counter.to_bytes(4) * 500 for entry in entries.values())


FILLER = """
import resource, sys
from pathlib import Path
from covey.effects.store import StoreError, opened
from covey.schema.cluster import Entry, Version
with opened(Path(sys.argv[1]), "1.0") as store:
    store.keep({"wish/before": Entry(b"1", Version(1, "a"))})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        store.keep({f"wish/{n}": Entry(bytes(10_000), Version(n, "a")) for n in range(100)})
    except StoreError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    store.keep({"wish/after": Entry(b"2", Version(2, "a"))})
"""


def test_a_disk_that_takes_no_more_is_a_sentence_nothing_is_half_written_and_room_helps(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FILLER, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.startswith(f"nothing can be kept in {tmp_path / FILE} (")
    assert done.stdout.count("\n") == 1
    assert sorted(contents(tmp_path)) == ["wish/after", "wish/before"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk can't be mounted here: {mounted.stderr.strip()}")
    return folder


def test_a_really_full_disk(small_disk: Path) -> None:
    try:
        with opened(small_disk, "1.0") as first:
            first.keep({"wish/before": living(1)})
            with pytest.raises(StoreError, match="database or disk is full"):
                first.keep({f"wish/{number}": living(number, bytes(10_000)) for number in range(100)})
            first.keep({"wish/after": living(2)})
        assert sorted(contents(small_disk)) == ["wish/after", "wish/before"]
    finally:
        subprocess.run(["umount", str(small_disk)], check=True)


DAMAGES = {
    "no database": lambda path: path.write_bytes(b"hello " * 1_000),
    "zeros at the beginning": lambda path: path.write_bytes(bytes(4_096) + path.read_bytes()[4_096:]),
    "zeros inside": lambda path: path.write_bytes(
        path.read_bytes()[:4_096] + bytes(8_192) + path.read_bytes()[12_288:]
    ),
    "the end is missing": lambda path: os.truncate(path, path.stat().st_size // 2),
    "another program's": lambda path: _execute(path, "DROP TABLE entries"),
    "text that is none": lambda path: _execute(path, "UPDATE entries SET writer = CAST(x'ff00ff' AS TEXT)"),
}


def _execute(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_a_damaged_file_is_put_aside_and_the_person_told(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path, "1.0") as first:
        first.keep({f"wish/{number}": living(number, bytes(3_000)) for number in range(1, 20)})
    DAMAGES[damage](tmp_path / FILE)
    bad = (tmp_path / FILE).read_bytes()
    with opened(tmp_path, "1.0", lambda: NOW_S) as second:
        assert second.restored.entries == {}
        second.keep({"wish/a": living(1)})
    [aside] = tmp_path.glob("*.damaged-*Z")
    assert aside.name == f"{FILE}.damaged-20270115T080000Z"
    assert aside.read_bytes() == bad
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("what this node had kept of people's wishes is damaged (")
    assert f"lies in {aside} now" in record.getMessage()
    assert list(contents(tmp_path)) == ["wish/a"]


def test_an_empty_file_is_a_new_store(tmp_path: Path) -> None:
    """All that is left of a power cut during the very first start."""
    (tmp_path / FILE).touch()
    assert contents(tmp_path) == {}
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_only_the_newest_damaged_files_are_kept(tmp_path: Path) -> None:
    for day in range(6):
        (tmp_path / FILE).write_bytes(b"hello " * 1_000)
        contents(tmp_path, NOW_S + day * DAY_S)
    assert sorted(path.name[-16:-8] for path in tmp_path.glob("*.damaged-*")) == ["20270118", "20270119", "20270120"]


def refusal(folder: Path) -> str:
    with pytest.raises(StoreError) as caught, opened(folder, "1.0"):
        pass
    return str(caught.value)


def test_a_folder_that_can_not_be_used_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "missing", tmp_path / "file"):
        assert refusal(folder).startswith(
            f"{folder / FILE}, where this node keeps what people asked for, can't be used"
        )
        assert refusal(folder).endswith("choose another folder with --data-dir")

    def forbid(*_: object) -> int:  # root may write anywhere
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(store.os, "open", forbid)
    assert "(" in refusal(tmp_path)
    assert "Permission denied" in refusal(tmp_path)
    assert not list(tmp_path.glob("*damaged*"))


def test_a_file_that_another_process_holds_is_a_sentence_and_stays(tmp_path: Path) -> None:
    with opened(tmp_path, "1.0") as first:
        first.keep({"wish/a": living(1)})
        assert "database is locked" in refusal(tmp_path)
    assert list(contents(tmp_path)) == ["wish/a"]


# ---- layouts: this program is N, one with a step more is N + 1 ----

NEXT = (*STEPS, "ALTER TABLE entries ADD COLUMN note TEXT NOT NULL DEFAULT ''")


def upgraded(path: Path, steps: tuple[str, ...] = NEXT, version: str = "2.0") -> Path | None:
    """What the next version of the program would do at its start."""
    with closing(sqlite3.connect(path)) as connection:
        return migrate(connection, path, steps, version)


def test_the_next_version_takes_over_what_this_one_kept_after_a_copy(tmp_path: Path) -> None:
    path = tmp_path / FILE
    with opened(tmp_path, "1.0") as first:
        first.keep({"wish/a": living(1)})
    copy = upgraded(path)
    assert copy == tmp_path / f"{FILE}.layout-1"
    assert copy.stat().st_mode & 0o777 == 0o600
    with closing(sqlite3.connect(path)) as connection:
        assert layout(connection) == 2
        assert connection.execute("SELECT key, note FROM entries").fetchall() == [("wish/a", "")]
    assert upgraded(path) is None  # nothing is left to do

    path.unlink()
    copy.rename(path)  # back to this version, by hand
    assert contents(tmp_path) == {"wish/a": living(1)}


def test_this_version_leaves_the_file_of_the_next_one_alone_and_names_what_fits(tmp_path: Path) -> None:
    path = tmp_path / FILE
    contents(tmp_path)
    upgraded(path)
    before = path.read_bytes()
    assert refusal(tmp_path) == (
        f"what people asked for lies in {path} as Covey 2.0 wrote it, which this one, 1.0, can't read; "
        "install Covey 2.0 or a newer one"
    )
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir() if "damaged" in each.name] == []


def test_a_step_that_fails_leaves_the_layout_before_it(tmp_path: Path) -> None:
    path = tmp_path / FILE
    with opened(tmp_path, "1.0") as first:
        first.keep({"wish/a": living(1)})
    with pytest.raises(sqlite3.OperationalError):
        upgraded(path, (*STEPS, "ALTER TABLE entries ADD COLUMN note; ALTER TABLE nothing ADD COLUMN note"))
    assert contents(tmp_path) == {"wish/a": living(1)}
    assert upgraded(path) is not None


def test_a_file_of_a_newer_layout_that_does_not_say_whose_is_damaged(tmp_path: Path) -> None:
    contents(tmp_path)
    upgraded(tmp_path / FILE)
    _execute(tmp_path / FILE, "DELETE FROM about")
    assert contents(tmp_path) == {}
    assert list(tmp_path.glob("*.damaged-*"))


def test_the_newer_layout_is_told_apart_from_damage(tmp_path: Path) -> None:
    contents(tmp_path)
    upgraded(tmp_path / FILE)
    with pytest.raises(NewerLayoutError, match=r"2\.0"):
        Store(tmp_path / FILE, "1.0", lambda: NOW_S)
