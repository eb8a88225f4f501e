"""Programs called `systemctl` and `launchctl` that behave as the real ones are documented to, as far as we ask them.

They note each call, and keep in a folder whether the service is enabled and runs. A file `config` there names the
manager's own XDG_CONFIG_HOME, `stays` lets the service survive its stop, and `refuses` makes `enable` fail.
"""

import shlex
from pathlib import Path

SYSTEMCTL = """#!/bin/sh
folder={folder}
echo "$*" >> "$folder/calls"
[ "$1" = --user ] && shift
config=${XDG_CONFIG_HOME:-$HOME/.config}
[ -e "$folder/config" ] && config=$(cat "$folder/config")
user="$config/systemd/user"
known() {
    [ -e "$user/covey.service" ] && ! [ -e "$folder/refuses" ] && return
    echo "Failed to $1 unit: Unit file covey.service does not exist." >&2
    exit 1
}
case "$1" in
show)
    if [ "$2" = --property=Version ]; then echo "Version=252 (252.38-1)"; exit; fi
    if [ "$2" = --property=UnitPath ]; then echo "UnitPath=\\"$user.control\\" /run/u.control"; exit; fi
    state=inactive; pid=0; since=; load=not-found
    if [ -e "$user/covey.service" ]; then load=loaded; fi
    if [ -e "$folder/runs" ]; then state=active; pid=4711; since="Sat 2026-11-21 10:00:00 UTC"; fi
    printf 'LoadState=%s\\nActiveState=%s\\nSubState=running\\nMainPID=%s\\n' $load $state $pid
    printf 'NRestarts=%s\\nActiveEnterTimestamp=%s\\n' "$(cat "$folder/restarts" 2>/dev/null || echo 0)" "$since" ;;
enable) known enable; touch "$folder/enabled" ;;
restart) touch "$folder/runs" ;;
disable) known disable; rm -f "$folder/enabled" ;;
stop)
    [ -e "$folder/runs" ] || { echo "Failed to stop covey.service: Unit covey.service not loaded." >&2; exit 5; }
    if [ -e "$folder/stays" ]; then echo "Job for covey.service failed." >&2; exit 1; fi
    rm "$folder/runs" ;;
reset-failed) echo "Unit covey.service not loaded." >&2; exit 1 ;;
esac
"""
LAUNCHCTL = """#!/bin/sh
folder={folder}
echo "$*" >> "$folder/calls"
case "$1" in
print)
    case "$2" in */*/*) ;; *) exit 0 ;; esac
    [ -e "$folder/runs" ] || exit 113
    printf 'gui/0/covey.node = {\\n\\tactive count = 1\\n\\tstate = running\\n\\n\\truns = 3\\n\\tpid = 4711\\n'
    printf '\\tsub = {\\n\\t\\tstate = waiting\\n\\t}\\n}\\n' ;;
bootout)
    [ -e "$folder/runs" ] || exit 3
    [ -e "$folder/stays" ] && exit 36
    rm "$folder/runs"; touch "$folder/leaving" ;;
bootstrap)
    if [ -e "$folder/leaving" ]; then rm "$folder/leaving"; echo "Input/output error" >&2; exit 5; fi
    touch "$folder/runs" ;;
esac
"""
NOBODY = "#!/bin/sh\necho 'Failed to connect to bus: No medium found' >&2\nexit 1\n"


def place(folder: Path, name: str, text: str) -> Path:
    """Makes the program `name` in `folder`, which is for PATH."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(text.replace("{folder}", shlex.quote(str(folder))))
    program.chmod(0o755)
    return program


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()
