"""`covey service` as a person uses it, with a systemctl that the test made."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from covey.cli.main import up
from covey.cli.service import written
from covey.effects.code_file import known_code
from tests.credentials import CODE
from tests.desktop.fake_managers import SYSTEMCTL, place

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="the fake is of Linux's systemctl")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    place(tmp_path / "bin", "systemctl", SYSTEMCTL)
    return tmp_path


def covey(home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("COVEY_")},
        "PATH": f"{home}/bin:/usr/bin:/bin",
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home / "config"),
        "COVEY_HOME": str(home / "data"),
        **more,
    }
    command = [sys.executable, "-m", "covey.cli", "service", *arguments]
    return subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=60, check=False)


def unit(home: Path) -> str:
    return (home / "config" / "systemd" / "user" / "covey.service").read_text()


def test_from_the_first_command_to_the_last(home: Path) -> None:
    done = covey(home, "install", "--name", "my attic", "--data-dir", "here", "--peer", "a", "--peer", "b", "--no-auth")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The service is installed: ")
    assert f"It runs: covey up --data-dir={home}/here '--name=my attic' --peer=a --peer=b --no-auth" in done.stdout
    assert "`loginctl enable-linger " in done.stderr
    assert '"up" "--data-dir=' in unit(home)
    assert covey(home, "install", COVEY_LOAD_TIMEOUT_S="900").stdout.startswith("The service is updated: ")
    assert "COVEY_LOAD_TIMEOUT_S=900" in unit(home)
    assert "attic" not in unit(home)
    assert "active (running)" in covey(home, "status").stdout
    told = json.loads(covey(home, "status", "--json").stdout)
    assert (told["is_running"], told["process_id"]) == (True, 4711)
    (home / "data").mkdir(exist_ok=True)
    done = covey(home, "uninstall")
    assert done.stdout.startswith("The service is stopped and removed.\nModels, identity and join code stay in ")
    assert (home / "data").exists()
    assert covey(home, "uninstall").stdout == "No service is installed, so there is nothing to remove.\n"
    assert covey(home, "status").stdout.startswith("No service is installed.")


def test_a_service_whose_file_is_gone_is_shown_and_ended(home: Path) -> None:
    covey(home, "install")
    (home / "config" / "systemd" / "user" / "covey.service").unlink()
    shown = covey(home, "status").stdout
    assert "active (running)" in shown
    assert "is gone; `covey service uninstall` ends what is left" in shown
    assert covey(home, "uninstall").stdout.startswith("The service is stopped and removed.")
    assert covey(home, "status").stdout.startswith("No service is installed.")


@pytest.mark.parametrize("is_typed", [True, False])
def test_the_join_code_is_kept_and_not_written(home: Path, *, is_typed: bool) -> None:
    if is_typed:
        done = covey(home, "install", "--join", CODE.text(), "--port", "53201")
    else:
        done = covey(home, "install", "--port", "53201", COVEY_JOIN=CODE.text())
    assert done.returncode == 0, done.stderr
    assert known_code(home / "data") == CODE
    assert "--port=53201" in unit(home)
    assert CODE.text() not in unit(home) + done.stdout + done.stderr


def test_a_node_that_ends_at_once_is_told(home: Path) -> None:
    (home / "bin" / "restarts").write_text("2\n")
    done = covey(home, "install")
    assert done.returncode == 1
    assert "But the node ends as soon as it starts" in done.stderr
    assert "journalctl --user -u covey.service" in done.stdout


def test_wrong_usage_is_no_service(home: Path) -> None:
    for arguments in (("--nam", "x"), ("--until-stdin-closes",), ("--open", "--join", "X"), ("--port", "99999")):
        assert covey(home, "install", *arguments).returncode == 2
    assert not (home / "config").exists()


def test_each_option_is_written_as_it_is_typed() -> None:
    given = {"log_requests": True, "anyone_joins": True, "allow_origin": ["https://a b"], "host": "::", "port": 52415}
    written_ = written(inspect.signature(up), given)
    assert written_ == ["--log-requests", "--open", "--allow-origin=https://a b", "--host=::"]
