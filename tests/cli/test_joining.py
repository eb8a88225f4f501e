"""A code is typed on another device, once: it is kept, what that means is said, and it is seen nowhere afterwards."""

import os
import sys
from pathlib import Path

import pytest

from covey.cli import joining
from covey.cli.client import CliError
from covey.control.join_code import JoinCode
from covey.effects.code_file import Former, known_code, replace_code
from tests.credentials import CODE, OTHER_CODE


class StartedAgainError(Exception):
    """`execv` does not return."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def start_again(path: str, arguments: list[str]) -> None:
        assert path == arguments[0] == sys.executable
        raise StartedAgainError(*arguments[1:])

    monkeypatch.setenv("COVEY_HOME", str(tmp_path))
    monkeypatch.delenv("COVEY_JOIN", raising=False)
    monkeypatch.delenv("COVEY_CLUSTER", raising=False)
    monkeypatch.setattr(os, "execv", start_again)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "covey.cli", "up", "--join", CODE.text(), "--port", "1"])
    return tmp_path


def join(typed: str | None) -> tuple[str, ...]:
    with pytest.raises(StartedAgainError) as started:
        joining.take_code(typed)
    return started.value.args


def test_nothing_given_nothing_done(home: Path) -> None:
    joining.take_code(None)
    assert known_code(home) is None


def test_a_code_is_kept_and_leaves_the_command_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert join(CODE.text().lower().replace("-", " ")) == ("-m", "covey.cli", "up", "--port", "1")
    assert known_code(home) == CODE
    shown = capsys.readouterr().out
    assert shown == "This device joins cluster glad-lynx.\n"


def test_another_cluster_is_left_with_a_word_and_a_way_back(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replace_code(home, OTHER_CODE)
    join(CODE.text())
    shown = " ".join(capsys.readouterr().out.split())
    assert "leaves cluster" in shown
    assert "joins cluster glad-lynx" in shown
    assert (home / "join-code.former").read_text().strip() == OTHER_CODE.text()


def test_the_same_code_again_is_no_news(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replace_code(home, CODE)
    join(CODE.text())
    assert capsys.readouterr().out == ""


def test_the_environment_does_the_same_and_is_not_handed_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COVEY_JOIN", CODE.text())
    join(None)
    assert known_code(home) == CODE
    assert "COVEY_JOIN" not in os.environ


def test_a_service_with_the_old_code_does_not_undo_a_rotation(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_code(home, OTHER_CODE)
    replace_code(home, CODE)
    monkeypatch.setenv("COVEY_JOIN", OTHER_CODE.text())
    joining.take_code(None)
    assert known_code(home) == CODE
    assert "is ignored; update it" in " ".join(capsys.readouterr().err.split())
    join(OTHER_CODE.text())
    assert known_code(home) == OTHER_CODE


@pytest.mark.parametrize("former", [None, OTHER_CODE.text(), "?"])
def test_nor_does_one_with_a_code_from_before_the_last_rotation(
    home: Path, monkeypatch: pytest.MonkeyPatch, former: str | None
) -> None:
    """Two devices were lost in a year; nobody has touched the service's file since the first start."""
    third = JoinCode(bytes([3]) * 16)
    replace_code(home, CODE)
    replace_code(home, OTHER_CODE, Former(CODE))
    replace_code(home, third, Former(OTHER_CODE))
    (home / "join-code.former").unlink()
    if former is not None:
        (home / "join-code.former").write_text(former)
    monkeypatch.setenv("COVEY_JOIN", CODE.text())
    joining.take_code(None)
    assert known_code(home) == third


def test_a_damaged_code_is_put_back(home: Path) -> None:
    (home / "join-code").write_text("?")
    join(CODE.text())
    assert known_code(home) == CODE


def test_a_mistyped_code_changes_nothing(home: Path) -> None:
    replace_code(home, OTHER_CODE)
    with pytest.raises(CliError, match=r"^The join code is mistyped: the last character does not fit"):
        joining.take_code(CODE.text()[:-1] + "0")
    assert known_code(home) == OTHER_CODE


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (["up", "--join", "X"], ["up"]),
        (["up", "--join=X", "--port", "1"], ["up", "--port", "1"]),
        (["up", "--name", "a"], ["up", "--name", "a"]),
        (["up", "--join", "--join"], ["up"]),
    ],
)
def test_the_code_is_taken_out_of_the_arguments(arguments: list[str], left: list[str]) -> None:
    assert joining.without_code(arguments) == left


def test_a_log_does_not_get_the_code(home: Path) -> None:
    """Standard output is no terminal here, as in a service."""
    replace_code(home, CODE)
    assert CODE.text() not in joining.how_to_join(is_open=False)
    assert "anyone" in joining.how_to_join(is_open=True) or "whoever" in joining.how_to_join(is_open=True)
