"""A folder as others of its machine meet it."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from covey.effects import surroundings


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """`models`, for all to read, in the folder of a user; above that all may pass, which is not so in pytest's own."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        made = Path(name) / "home" / "models"
        made.mkdir(parents=True)
        for folder in (Path(name), made.parent, made):
            folder.chmod(0o755)
        yield made


@pytest.mark.parametrize("mode", [0o755, 0o711, 0o750, 0o710])
def test_others_reach_what_all_folders_above_let_them_pass_to(open_folder: Path, mode: int) -> None:
    open_folder.parent.chmod(mode)
    assert surroundings.folder(open_folder).is_in_reach


@pytest.mark.parametrize("mode", [0o700, 0o744])
def test_a_closed_folder_above_keeps_others_out(open_folder: Path, mode: int) -> None:
    open_folder.parent.chmod(mode)
    assert not surroundings.folder(open_folder).is_in_reach


def test_a_link_is_judged_by_where_it_leads(open_folder: Path) -> None:
    open_folder.parent.chmod(0o700)
    link = open_folder.parent.parent / "link"
    link.symlink_to(open_folder)
    assert not surroundings.folder(link).is_in_reach
