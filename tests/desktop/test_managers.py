"""The commands that are given to systemd and launchd, and what is understood of their answers."""

import plistlib
from pathlib import Path

import pytest

from covey.desktop import launchd
from covey.desktop.launchd import Launchd
from covey.desktop.service import Service, ServiceError
from covey.desktop.systemd import Systemd
from tests.desktop.fake_managers import LAUNCHCTL, NOBODY, SYSTEMCTL, calls, place

SERVICE = Service(command=("/x/python", "up"), environment=())
LATER = Service(command=("/x/python", "up", "--port=1"), environment=())


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "my bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return folder


@pytest.fixture
def systemd(bin_folder: Path, tmp_path: Path) -> Systemd:
    place(bin_folder, "systemctl", SYSTEMCTL.replace("{folder}", f"'{bin_folder}'"))
    return Systemd({"XDG_CONFIG_HOME": str(tmp_path / "config")})


@pytest.fixture
def agent(bin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Launchd:
    place(
        bin_folder, "launchctl", LAUNCHCTL.replace("{folder}", f"'{bin_folder}'").replace("{{", "{").replace("}}", "}")
    )
    monkeypatch.setattr(launchd, "TRY_S", 0.01)
    return Launchd()


def test_a_unit_is_installed_changed_looked_at_and_removed(systemd: Systemd, bin_folder: Path) -> None:
    assert systemd.status().state == "inactive (running)"
    assert not systemd.status().is_installed
    assert systemd.install(SERVICE) is True
    assert calls(bin_folder)[-3:] == [
        "--user daemon-reload",
        "--user enable covey.service",
        "--user restart covey.service",
    ]
    assert systemd.install(LATER) is False
    assert "--port=1" in systemd.file.read_text()
    status = systemd.status()
    assert (status.is_installed, status.is_running, status.process_id, status.restarts) == (True, True, 4711, 0)
    assert status.since == "Sat 2026-11-21 10:00:00 UTC"
    assert systemd.uninstall() is True
    assert not systemd.file.exists()
    assert not (bin_folder / "runs").exists()
    assert calls(bin_folder)[-3:] == [
        "--user disable --now covey.service",
        "--user daemon-reload",
        "--user reset-failed covey.service",
    ]
    assert systemd.uninstall() is False


def test_a_program_that_systemd_would_not_start_is_told(systemd: Systemd) -> None:
    with pytest.raises(ServiceError, match="quotes in its name: /my 'own'/python"):
        systemd.install(Service(command=("/my 'own'/python",), environment=()))
    assert not systemd.file.exists()


def test_where_the_unit_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert str(Systemd({}).file) == "/home/me/.config/systemd/user/covey.service"
    assert Systemd({"XDG_CONFIG_HOME": "relative"}).file == Systemd({}).file


def test_a_container_without_a_session_changes_nothing(bin_folder: Path, tmp_path: Path) -> None:
    place(bin_folder, "systemctl", NOBODY)
    found = Systemd({"XDG_CONFIG_HOME": str(tmp_path / "config")})
    for act in (lambda: found.install(SERVICE), found.uninstall, found.status):
        with pytest.raises(ServiceError, match=r"No systemd answers for this user here \(Failed to connect.*container"):
            act()
    assert not found.file.exists()


def test_a_machine_without_systemd(bin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(bin_folder))
    with pytest.raises(ServiceError, match="There is no systemctl here"):
        Systemd({}).status()


def test_an_agent_is_installed_changed_looked_at_and_removed(agent: Launchd, bin_folder: Path) -> None:
    assert agent.install(SERVICE) is True
    assert calls(bin_folder)[-1] == f"bootstrap {agent._domain} {agent.file}"
    assert agent.install(LATER) is False, "the former one takes its time to leave"
    assert plistlib.loads(agent.file.read_bytes())["ProgramArguments"] == list(LATER.command)
    status = agent.status()
    assert (status.state, status.process_id, status.restarts) == ("running", 4711, 2)
    assert agent.uninstall() is True
    assert not agent.file.exists()
    assert agent.status().state == "not installed"
    assert agent.uninstall() is False


def test_an_agent_that_can_not_start_is_told(agent: Launchd, bin_folder: Path) -> None:
    place(bin_folder, "launchctl", '#!/bin/sh\n[ "$1" != bootstrap ] || { echo "Bootstrap failed: 5" >&2; exit 5; }\n')
    with pytest.raises(ServiceError, match="Bootstrap failed: 5"):
        agent.install(SERVICE)
