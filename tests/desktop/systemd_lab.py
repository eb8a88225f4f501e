"""A systemd of one's own: a user's manager, alone in a mount namespace with its own cgroup and runtime folder.

It needs root and cgroup version 2. Nothing of the machine's own services is seen or touched.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

MANAGER = Path("/lib/systemd/systemd")
CGROUP = Path("/sys/fs/cgroup")
LIFE_S_MAX = 120
_SETUP = """
umount -l /sys/fs/cgroup 2>/dev/null
mount -t cgroup2 none /sys/fs/cgroup || exit 77
mount -t tmpfs none /run || exit 77
mkdir -p /run/systemd/system /run/user/0 && chmod 700 /run/user/0
mkdir {cgroup} && echo $$ > {cgroup}/cgroup.procs || exit 77
export XDG_RUNTIME_DIR=/run/user/0
timeout -k 5 {life} {manager} --user > {log} 2>&1 &
manager=$!
for _ in $(seq 50); do systemctl --user show --property=Version >/dev/null 2>&1 && break; sleep 0.1; done
{script}
status=$?
kill -TERM $manager
wait $manager
echo $$ > /sys/fs/cgroup/cgroup.procs
find {cgroup} -depth -type d -exec rmdir {{}} \\;
exit $status
"""


def missing() -> str:
    """Why there can't be one here; empty if there can."""
    if sys.platform != "linux" or not MANAGER.exists() or not shutil.which("systemctl"):
        return "there is no systemd here"
    if os.geteuid() != 0 or not shutil.which("unshare"):
        return "a systemd of one's own needs root and unshare"
    return ""


def run_in_lab(tmp_path: Path, script: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs the shell script where `systemctl --user` answers. Status 77: there are no cgroups of version 2."""
    text = _SETUP.format(
        cgroup=CGROUP / f"covey-test-{os.getpid()}",
        life=LIFE_S_MAX,
        manager=MANAGER,
        log=shlex.quote(str(tmp_path / "systemd.log")),
        script=script,
    )
    return subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "bash", "-c", text],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIFE_S_MAX + 30,
        check=False,
    )
