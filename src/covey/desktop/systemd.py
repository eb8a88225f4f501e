"""The service under systemd, as a unit of the user: nothing of the system is touched, and no password is asked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from covey.desktop.managing import ELSE, ask, demand, remove_file, said, write_file
from covey.desktop.service import Service, ServiceError, ServiceStatus
from covey.desktop.systemd_unit import UNIT_NAME, can_start, unit

SYSTEMCTL: Final = ("systemctl", "--user")
LOG_COMMAND: Final = f"journalctl --user -u {UNIT_NAME} -e"
FIELDS: Final = ("LoadState", "ActiveState", "SubState", "MainPID", "NRestarts", "ActiveEnterTimestamp")


class Systemd:
    def __init__(self, environment: Mapping[str, str]) -> None:
        chosen = environment.get("XDG_CONFIG_HOME", "")
        folder = Path(chosen) if chosen.startswith("/") else Path.home() / ".config"  # a relative one is invalid
        self.file = folder / "systemd" / "user" / UNIT_NAME

    def install(self, service: Service) -> bool:
        text = unit(service, self._version())
        if not can_start(service.command[0]):
            raise ServiceError(
                f"systemd starts no program in a folder with quotes in its name: {service.command[0]}. Install Covey "
                "in another one."
            )
        is_new = write_file(self.file, text.encode(errors="surrogateescape"))
        demand([*SYSTEMCTL, "daemon-reload"])
        demand([*SYSTEMCTL, "enable", UNIT_NAME])
        demand([*SYSTEMCTL, "restart", UNIT_NAME])
        return is_new

    def uninstall(self) -> bool:
        self._version()
        if not self.file.exists():
            return False
        demand([*SYSTEMCTL, "disable", "--now", UNIT_NAME])
        remove_file(self.file)
        demand([*SYSTEMCTL, "daemon-reload"])
        ask([*SYSTEMCTL, "reset-failed", UNIT_NAME])  # it fails where there is nothing to forget
        return True

    def status(self) -> ServiceStatus:
        self._version()
        told = demand([*SYSTEMCTL, "show", UNIT_NAME, f"--property={','.join(FIELDS)}"])
        return status_of(dict(line.split("=", 1) for line in told.splitlines() if "=" in line), self.file)

    @staticmethod
    def _version() -> int:
        """Of the systemd that answers for this user. Raises `ServiceError` where none does."""
        done = ask([*SYSTEMCTL, "show", "--property=Version"])
        if done.returncode:
            raise ServiceError(f"No systemd answers for this user here ({said(done)}), so it can keep none. {ELSE}")
        digits = done.stdout.partition("=")[2].partition(".")[0].partition("~")[0].split("-")[0].split(" ")[0].strip()
        return int(digits) if digits.isdecimal() else 0


def status_of(told: Mapping[str, str], file: Path) -> ServiceStatus:
    """From the properties that `systemctl show` names."""
    is_installed = file.exists()
    state = f"{told.get('ActiveState', 'unknown')} ({told.get('SubState', 'unknown')})"
    process_id, restarts = told.get("MainPID", "0"), told.get("NRestarts", "")
    return ServiceStatus(
        manager="systemd",
        file=str(file),
        is_installed=is_installed,
        is_running=told.get("ActiveState") == "active",
        state=state if is_installed or told.get("LoadState") == "loaded" else "not installed",
        process_id=int(process_id) if process_id.isdecimal() and process_id != "0" else None,
        since=told.get("ActiveEnterTimestamp") or None,
        restarts=int(restarts) if restarts.isdecimal() else None,
        log_command=LOG_COMMAND,
    )
