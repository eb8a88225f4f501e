"""What an earlier life of a node left is ended; whoever has its number now is not."""

import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil
import pytest

from covey.effects.leftovers import FOLDER, Note, end_leftovers, forget, note


@contextmanager
def sleeping() -> Generator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        try:
            yield process
        finally:
            process.kill()


def test_what_was_left_is_ended_and_its_note_goes(tmp_path: Path) -> None:
    with sleeping() as process:
        note(tmp_path, process.pid)
        psutil.Process(process.pid).suspend()
        end_leftovers(tmp_path)
        assert not psutil.pid_exists(process.pid)
    assert list((tmp_path / FOLDER).iterdir()) == []


@pytest.mark.parametrize(
    "change", [{"started_s": 1.0}, {"boot_id": "another boot"}, {"boot_id": "", "booted_s": 5.0}], ids=str
)
def test_another_process_with_that_number_lives_on(tmp_path: Path, change: dict[str, object]) -> None:
    with sleeping() as process:
        note(tmp_path, process.pid)
        path = tmp_path / FOLDER / str(process.pid)
        noted = msgspec.json.decode(path.read_bytes(), type=Note)
        path.write_bytes(msgspec.json.encode(msgspec.structs.replace(noted, **change)))
        end_leftovers(tmp_path)
        assert process.poll() is None
        assert not path.exists()


def test_what_was_reaped_is_forgotten(tmp_path: Path) -> None:
    with sleeping() as process:
        note(tmp_path, process.pid)
        forget(tmp_path, process.pid)
        forget(tmp_path, process.pid)
        end_leftovers(tmp_path)
        assert process.poll() is None


def test_notes_of_nobody_and_nonsense_are_removed(tmp_path: Path) -> None:
    end_leftovers(tmp_path)
    folder = tmp_path / FOLDER
    folder.mkdir()
    (folder / "4194305").write_bytes(msgspec.json.encode(Note("", 0.0, 0.0)))
    (folder / "nonsense").write_bytes(b"\xff")
    (folder / "1").write_bytes(b"{}")
    end_leftovers(tmp_path)
    assert list(folder.iterdir()) == []


def test_a_process_that_is_gone_or_a_folder_that_cannot_be_written_is_told_and_no_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    note(tmp_path, 4194305)
    (tmp_path / "file").write_text("")
    with sleeping() as process:
        note(tmp_path / "file", process.pid)
        assert [record.args[0] for record in caplog.records if record.args] == [4194305, process.pid]
    assert not (tmp_path / FOLDER).exists()
