"""A node under a real systemd: killed with SIGKILL it comes back, ended in order it does not, removed it is gone."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.desktop.systemd_lab import missing, run_in_lab

PORT = 53271
NO_CGROUPS = 77
SCRIPT = """
covey() {{ {python} -m covey.cli "$@"; }}
answers() {{ for _ in $(seq 100); do covey nodes --url {port} --json 2>/dev/null && return; sleep 0.2; done; }}
pid() {{ systemctl --user show covey.service --property=MainPID --value; }}
set -e
covey service install --port {port} --name "my 100% \\$HOME ü" --interface 127.0.0.1 >&2
answers > first
pid > first_pid
kill -KILL $(pid)
answers > second
covey service status --json > status
kill -TERM $(pid)
for _ in $(seq 100); do [ $(pid) = 0 ] && break; sleep 0.1; done
sleep 6
pid > ended_pid
export XDG_CONFIG_HOME=$HOME/of-the-shell
covey service install --port {port} --name other --interface 127.0.0.1 >&2
answers > third
rm $HOME/.config/systemd/user/covey.service
systemctl --user daemon-reload
covey service uninstall >&2
systemctl --user is-active covey.service > after || true
"""


@pytest.mark.skipif(bool(missing()), reason=missing())
@pytest.mark.slow
def test_a_killed_node_comes_back_and_a_removed_one_does_not(tmp_path: Path) -> None:
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "COVEY_HOME": str(tmp_path / "my data"),
        "USER": "root",
        "COVEY_CLUSTER": "of its own",
    }
    script = SCRIPT.format(python=sys.executable, port=f"127.0.0.1:{PORT}".partition(":")[2])
    script = script.replace(f"--url {PORT}", f"--url 127.0.0.1:{PORT}")
    done = run_in_lab(tmp_path, f"cd {tmp_path}\n({script})", environment)
    if done.returncode == NO_CGROUPS:
        pytest.skip("there are no cgroups of version 2 here")
    assert done.returncode == 0, done.stderr

    def read(name: str) -> str:
        return (tmp_path / name).read_text()

    first, second, third = (json.loads(read(name))[0] for name in ("first", "second", "third"))
    assert first["name"] == second["name"] == "my 100% $HOME ü"
    assert third["name"] == "other"
    assert first["node_id"] == second["node_id"] == third["node_id"]
    status = json.loads(read("status"))
    assert (status["is_running"], status["restarts"]) == (True, 1)
    assert status["process_id"] != int(read("first_pid"))
    assert read("ended_pid").strip() == "0", "who ended it in order meant it"
    assert read("after").strip() == "inactive"
    assert not (tmp_path / "of-the-shell").exists(), "the manager does not look there"
    assert not (tmp_path / ".config" / "systemd" / "user" / "covey.service").exists()
    assert not list((tmp_path / ".config" / "systemd" / "user").rglob("*.service"))
