"""The service under systemd, as a unit of the user: nothing of the system is touched, and no password is asked."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from covey.desktop.managing import ELSE, ask, demand, remove_file, said, write_file
from covey.desktop.service import NOT_INSTALLED, Service, ServiceError, ServiceStatus
from covey.desktop.systemd_unit import UNIT_NAME, can_start, unit

SYSTEMCTL: Final = ("systemctl", "--user")
LOG_COMMAND: Final = f"journalctl --user -u {UNIT_NAME} -e"
FIELDS: Final = ("ActiveState", "SubState", "MainPID", "NRestarts", "ActiveEnterTimestamp")
ENDED: Final = frozenset({"inactive", "failed"})


class Systemd:
    def install(self, service: Service) -> bool:
        text = unit(service, self._version())
        if not can_start(service.command[0]):
            raise ServiceError(
                f"systemd starts no program in a folder with quotes in its name: {service.command[0]}. Install Covey "
                "in another one."
            )
        file = _file()
        is_new = write_file(file, text.encode(errors="surrogateescape"))
        demand([*SYSTEMCTL, "daemon-reload"])
        try:
            demand([*SYSTEMCTL, "enable", UNIT_NAME])
        except ServiceError:
            if is_new:
                remove_file(file)  # else it would be called installed, and never start
            raise
        demand([*SYSTEMCTL, "restart", UNIT_NAME])
        return is_new

    def uninstall(self) -> bool:
        """Also where the file or the service alone is left of it."""
        self._version()
        file = _file()
        if not file.exists() and _told()["ActiveState"] in ENDED:
            return False
        ask([*SYSTEMCTL, "disable", UNIT_NAME])  # it fails where the file is gone, and so does the next one
        stopped = ask([*SYSTEMCTL, "stop", UNIT_NAME])
        remove_file(file)
        demand([*SYSTEMCTL, "daemon-reload"])
        ask([*SYSTEMCTL, "reset-failed", UNIT_NAME])  # it fails where there is nothing to forget
        if (state := _told()["ActiveState"]) not in ENDED:
            raise ServiceError(
                f"The service's file is removed, but systemd says that the node is still {state} ({said(stopped)}): "
                f"`systemctl --user stop {UNIT_NAME}` ends it."
            )
        return True

    def status(self) -> ServiceStatus:
        self._version()
        return status_of(_told(), _file())

    @staticmethod
    def _version() -> int:
        """Of the systemd that answers for this user. Raises `ServiceError` where none does."""
        done = ask([*SYSTEMCTL, "show", "--property=Version"])
        if done.returncode:
            raise ServiceError(f"No systemd answers for this user here ({said(done)}), so it can keep none. {ELSE}")
        digits = done.stdout.partition("=")[2].partition(".")[0].partition("~")[0].split("-")[0].split(" ")[0].strip()
        return int(digits) if digits.isdecimal() else 0


def _file() -> Path:
    """Where the manager looks for what its user wrote, which it says itself: it need not have the variables of the
    shell that asks. First of all it names the folder of that name for `systemctl set-property` (systemd.unit(5)).
    """
    told = demand([*SYSTEMCTL, "show", "--property=UnitPath"]).partition("=")[2]
    try:
        first = next(iter(shlex.split(told)), "")
    except ValueError:
        first = ""
    chosen = first.removesuffix(".control")
    is_known = chosen != first and first.startswith("/") and chosen.endswith("/systemd/user")
    return (Path(chosen) if is_known else Path.home() / ".config/systemd/user") / UNIT_NAME


def _told() -> dict[str, str]:
    """What the manager says of the service, by property."""
    told = demand([*SYSTEMCTL, "show", UNIT_NAME, f"--property={','.join(FIELDS)}"])
    return {"ActiveState": "unknown"} | dict(line.split("=", 1) for line in told.splitlines() if "=" in line)


def status_of(told: Mapping[str, str], file: Path) -> ServiceStatus:
    """From the properties that `systemctl show` names."""
    is_installed = file.exists()
    active = told.get("ActiveState", "unknown")
    state = f"{active} ({told.get('SubState', 'unknown')})"
    process_id, restarts = told.get("MainPID", "0"), told.get("NRestarts", "")
    return ServiceStatus(
        manager="systemd",
        file=str(file),
        is_installed=is_installed,
        is_running=active == "active",
        state=state if is_installed or active not in ENDED else NOT_INSTALLED,
        process_id=int(process_id) if process_id.isdecimal() and process_id != "0" else None,
        since=told.get("ActiveEnterTimestamp") or None,
        restarts=int(restarts) if restarts.isdecimal() else None,
        log_command=LOG_COMMAND,
    )
