"""A machine has one join code for all nodes of a user, from the first start on, and nobody else can read it."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from covey.effects.code_file import CodeFileError, kept_code, known_code, replace_code
from tests.credentials import CODE, OTHER_CODE


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_the_code_is_made_once(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert known_code(home) is None
    first = kept_code(home)
    assert kept_code(home) == first == known_code(home)
    assert (mode(home), mode(home / "join-code")) == (0o700, 0o600)


def test_two_homes_are_two_clusters(tmp_path: Path) -> None:
    assert kept_code(tmp_path / "a") != kept_code(tmp_path / "b")


def test_nodes_that_start_at_once_agree(tmp_path: Path) -> None:
    """The demo starts several, and none has been here before."""
    code = "from pathlib import Path; import sys; from covey.effects.code_file import kept_code\n"
    code += "sys.stdin.readline(); print(kept_code(Path(sys.argv[1])).text())"
    command = [sys.executable, "-c", code, str(tmp_path / "home")]
    started = [subprocess.Popen(command, stdin=-1, stdout=-1, text=True) for _ in range(4)]
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert len({process.communicate(timeout=30)[0] for process in started}) == 1


def test_another_code_replaces_it_and_the_former_is_kept(tmp_path: Path) -> None:
    assert replace_code(tmp_path, CODE) is None
    assert replace_code(tmp_path, CODE) is None
    aside = replace_code(tmp_path, OTHER_CODE)
    assert aside is not None
    assert aside.read_text() == CODE.text() + "\n"
    assert mode(aside) == 0o600
    assert known_code(tmp_path) == OTHER_CODE


def test_a_damaged_code_is_told_and_kept_until_a_person_replaces_it(tmp_path: Path) -> None:
    (tmp_path / "join-code").write_text("0000")
    with pytest.raises(CodeFileError, match="is damaged; put it back with `covey up --join CODE`"):
        kept_code(tmp_path)
    aside = replace_code(tmp_path, CODE)
    assert aside is not None
    assert aside.read_text() == "0000"
    assert kept_code(tmp_path) == CODE


def test_a_code_that_others_could_read_is_closed_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    code = kept_code(tmp_path)
    (tmp_path / "join-code").chmod(0o644)
    with caplog.at_level(logging.WARNING):
        assert kept_code(tmp_path) == code
    assert mode(tmp_path / "join-code") == 0o600
    assert "could be read by other users" in caplog.text
    assert code.text() not in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_a_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CodeFileError, match="can't be kept"):
        kept_code(tmp_path / "home")


def test_a_home_that_is_a_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    with pytest.raises(CodeFileError, match="can't be kept"):
        kept_code(tmp_path / "home")
