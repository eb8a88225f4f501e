"""One variable moves all data; without it the platform's own place is used."""

from pathlib import Path

import pytest

from covey.effects import paths


def test_covey_home_moves_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COVEY_HOME", str(tmp_path))
    assert paths.models_folder() == tmp_path / "models"
    assert paths.node_folder() == tmp_path / "node"


def test_a_chosen_folder_moves_the_node_but_not_the_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COVEY_HOME", str(tmp_path))
    assert paths.node_folder(tmp_path / "second") == tmp_path / "second"
    assert paths.models_folder() == tmp_path / "models"


def test_without_it_the_platform_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("COVEY_HOME", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tmp_path in paths.home().parents
    assert paths.home().name == "covey"


def test_a_private_folder_is_private(tmp_path: Path) -> None:
    assert paths.make_private(tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
