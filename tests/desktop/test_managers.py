"""The commands that are given to systemd and launchd, and what is understood of their answers."""

import plistlib
from pathlib import Path

import pytest

from covey.desktop import launchd
from covey.desktop.launchd import Launchd
from covey.desktop.service import Service, ServiceError
from covey.desktop.systemd import Systemd
from tests.desktop.fake_managers import LAUNCHCTL, NOBODY, SYSTEMCTL, calls, place

SERVICE = Service(command=("/x/python", "up"), environment=(), end_s=1)
LATER = Service(command=("/x/python", "up", "--port=1"), environment=(), end_s=1)


def unit_file(systemd: Systemd) -> Path:
    return Path(systemd.status().file)


SLOW_END = '( sleep 0.5; rm "$folder/runs" ) >/dev/null 2>&1 & exit 0; :'


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "my bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return folder


@pytest.fixture
def systemd(bin_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Systemd:
    place(bin_folder, "systemctl", SYSTEMCTL)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "my config"))
    return Systemd()


@pytest.fixture
def agent(bin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Launchd:
    place(bin_folder, "launchctl", LAUNCHCTL)
    monkeypatch.setattr(launchd, "TRY_S", 0.01)
    monkeypatch.setattr(launchd, "ROOM_S", 0.3)
    return Launchd()


def test_a_unit_is_installed_changed_looked_at_and_removed(systemd: Systemd, bin_folder: Path) -> None:
    assert systemd.status().state == "not installed"
    assert not systemd.status().is_installed
    assert systemd.install(SERVICE) is True
    assert calls(bin_folder)[-3:] == [
        "--user daemon-reload",
        "--user enable covey.service",
        "--user restart covey.service",
    ]
    assert systemd.install(LATER) is False
    assert "--port=1" in unit_file(systemd).read_text()
    status = systemd.status()
    assert (status.is_installed, status.is_running, status.process_id, status.restarts) == (True, True, 4711, 0)
    assert status.since == "Sat 2026-11-21 10:00:00 UTC"
    assert systemd.uninstall() is True
    assert not unit_file(systemd).exists()
    assert not (bin_folder / "runs").exists()
    assert [call.split()[1] for call in calls(bin_folder)[-8:-3]] == [
        "disable",
        "stop",
        "daemon-reload",
        "reset-failed",
        "show",
    ]
    assert systemd.uninstall() is False


def test_the_unit_goes_where_the_manager_looks(systemd: Systemd, bin_folder: Path, tmp_path: Path) -> None:
    """XDG_CONFIG_HOME is exported in `.bashrc`, and the user's manager has not got it."""
    (bin_folder / "config").write_text(str(tmp_path / "the manager's"))
    assert systemd.install(SERVICE) is True
    assert unit_file(systemd) == tmp_path / "the manager's" / "systemd" / "user" / "covey.service"
    assert not (tmp_path / "my config").exists()
    assert systemd.uninstall() is True


@pytest.mark.parametrize(
    "told", ["", "UnitPath=", "UnitPath=/run/user/0 /etc", 'UnitPath="/a', "UnitPath=x/systemd/user.control"]
)
def test_a_manager_that_does_not_say_where_it_looks(bin_folder: Path, tmp_path: Path, told: str) -> None:
    place(bin_folder, "systemctl", f"#!/bin/sh\necho '{told}'\n")
    assert unit_file(Systemd()) == tmp_path / "home" / ".config" / "systemd" / "user" / "covey.service"


def test_a_unit_that_can_not_be_enabled_leaves_nothing(systemd: Systemd, bin_folder: Path) -> None:
    (bin_folder / "refuses").touch()
    with pytest.raises(ServiceError, match=r"enable covey\.service` failed"):
        systemd.install(SERVICE)
    assert not unit_file(systemd).exists()
    assert systemd.uninstall() is False


def test_a_unit_that_could_not_be_enabled_before_keeps_its_file(systemd: Systemd, bin_folder: Path) -> None:
    systemd.install(SERVICE)
    (bin_folder / "refuses").touch()
    with pytest.raises(ServiceError, match=r"enable covey\.service` failed"):
        systemd.install(LATER)
    assert unit_file(systemd).exists()


def test_a_unit_that_the_manager_does_not_know_is_removed(systemd: Systemd, bin_folder: Path) -> None:
    systemd.install(SERVICE)
    (bin_folder / "runs").unlink()
    (bin_folder / "refuses").touch()
    assert systemd.uninstall() is True
    assert not unit_file(systemd).exists()


def test_a_service_whose_file_was_deleted_by_hand_is_stopped(systemd: Systemd, bin_folder: Path) -> None:
    systemd.install(SERVICE)
    unit_file(systemd).unlink()
    status = systemd.status()
    assert (status.is_installed, status.is_running, status.state) == (False, True, "active (running)")
    assert systemd.uninstall() is True
    assert not (bin_folder / "runs").exists()
    assert systemd.status().state == "not installed"


def test_a_service_that_does_not_stop_is_told_and_its_file_is_gone(systemd: Systemd, bin_folder: Path) -> None:
    systemd.install(SERVICE)
    (bin_folder / "stays").touch()
    with pytest.raises(ServiceError, match=r"still active \(Job for covey.service failed\): `systemctl --user stop"):
        systemd.uninstall()
    assert not unit_file(systemd).exists()


def test_a_program_that_systemd_would_not_start_is_told(systemd: Systemd) -> None:
    with pytest.raises(ServiceError, match="quotes in its name: /my 'own'/python"):
        systemd.install(Service(command=("/my 'own'/python",), environment=(), end_s=1))
    assert not unit_file(systemd).exists()


def test_a_container_without_a_session_changes_nothing(bin_folder: Path, tmp_path: Path) -> None:
    place(bin_folder, "systemctl", NOBODY)
    found = Systemd()
    for act in (lambda: found.install(SERVICE), found.uninstall, found.status):
        with pytest.raises(ServiceError, match=r"No systemd answers for this user here \(Failed to connect.*container"):
            act()
    assert not (tmp_path / "home").exists()


def test_a_machine_without_systemd(bin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(bin_folder))
    with pytest.raises(ServiceError, match="There is no systemctl here"):
        Systemd().status()


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
    place(bin_folder, "launchctl", LAUNCHCTL.replace("bootstrap)", "bootstrap) echo 'Bootstrap failed: 5' >&2; exit 5"))
    with pytest.raises(ServiceError, match="Bootstrap failed: 5"):
        agent.install(SERVICE)


def test_an_agent_that_does_not_leave_is_told_and_does_not_come_back(agent: Launchd, bin_folder: Path) -> None:
    agent.install(SERVICE)
    (bin_folder / "stays").touch()
    with pytest.raises(ServiceError, match=r"the former node has not ended within \d+ s"):
        agent.install(LATER)
    with pytest.raises(ServiceError, match=r"file is removed, but launchd still has the node \d+ s after"):
        agent.uninstall()
    assert not agent.file.exists()
    assert agent.status().state == "running"
    (bin_folder / "stays").unlink()
    assert agent.uninstall() is True, "its file is gone, and it still runs"
    assert agent.uninstall() is False


def test_an_agent_is_waited_for_as_long_as_it_may_take(
    agent: Launchd, bin_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than the tries to start the next one."""
    monkeypatch.setattr(launchd, "TRIES", 1)
    agent.install(SERVICE)
    place(bin_folder, "launchctl", LAUNCHCTL.replace('rm "$folder/runs"; touch', SLOW_END))
    assert agent.install(LATER) is False
    assert agent.status().state == "running"
