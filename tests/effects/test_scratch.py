"""What a killed process leaves in its folder goes with the next one; what lives is left alone."""

import subprocess
import sys
from pathlib import Path

import pytest

from covey.effects import scratch

HOLDER = """
import sys, time
from pathlib import Path
from covey.effects import scratch
with scratch.folder(Path(sys.argv[1])) as mine:
    (mine / "node.log").write_text("words")
    print(mine, flush=True)
    sys.stdin.read()
"""


def test_a_folder_goes_with_its_process(tmp_path: Path) -> None:
    parent = tmp_path / "not" / "yet"
    with scratch.folder(parent) as first, scratch.folder(parent) as second:
        assert first != second
        (first / "node").mkdir()
        (first / "node" / "log").write_text("words")
        assert first.stat().st_mode & 0o077 == 0
    assert list(parent.iterdir()) == []


def test_a_folder_goes_when_the_work_in_it_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="broken"), scratch.folder(tmp_path):
        raise RuntimeError("broken")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_lives_stays(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        try:
            with scratch.folder(tmp_path):
                assert (left / "node.log").read_text() == "words"
        finally:
            process.kill()
    assert left.exists()
    with scratch.folder(tmp_path) as mine:
        assert {each.name for each in tmp_path.iterdir()} == {mine.name, f"{mine.name}.lock"}


def test_what_can_not_be_removed_now_is_left_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dead").mkdir()

    def busy(_: Path) -> None:
        raise OSError(39, "Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr(scratch.shutil, "rmtree", busy)
        scratch.remove_leftovers(tmp_path)
    assert (tmp_path / "dead").exists()
    scratch.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []
