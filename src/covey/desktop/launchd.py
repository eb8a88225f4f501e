"""The service under launchd, as an agent of the user who is logged in."""

import os
import re
import time
from pathlib import Path
from typing import Final

from covey.desktop.launch_agent import LABEL, agent
from covey.desktop.managing import ask, demand, remove_file, said, write_file
from covey.desktop.service import NOT_INSTALLED, Service, ServiceError, ServiceStatus

TRIES: Final = 20  # an agent that was told to end is gone some time later, and only then takes the next one its name
TRY_S: Final = 0.5
_ROW: Final = re.compile(r"^\t(state|pid|runs) = (.+)$", re.MULTILINE)  # a tab: not those of parts of it


class Launchd:
    def __init__(self) -> None:
        library = Path.home() / "Library"
        self.file = library / "LaunchAgents" / f"{LABEL}.plist"
        self.log = library / "Logs" / "covey.log"
        self._domain = f"gui/{os.getuid()}"
        self._target = f"{self._domain}/{LABEL}"

    def install(self, service: Service) -> bool:
        self._answers()
        is_new = write_file(self.file, agent(service, self.log))
        ask(["launchctl", "bootout", self._target])  # it fails where none runs
        demand(["launchctl", "enable", self._target])
        self._start()
        return is_new

    def _start(self) -> None:
        command = ["launchctl", "bootstrap", self._domain, str(self.file)]
        for _ in range(TRIES - 1):
            if not ask(command).returncode:
                return
            time.sleep(TRY_S)
        demand(command)

    def uninstall(self) -> bool:
        self._answers()
        if not self.file.exists():
            return False
        ask(["launchctl", "bootout", self._target])  # it fails where none runs
        for _ in range(TRIES):
            if ask(["launchctl", "print", self._target]).returncode:
                break
            time.sleep(TRY_S)
        return remove_file(self.file)

    def status(self) -> ServiceStatus:
        self._answers()
        done = ask(["launchctl", "print", self._target])
        return status_of("" if done.returncode else done.stdout, self.file, self.log)

    def _answers(self) -> None:
        """Raises `ServiceError` where nobody is logged in at the screen: then there is nothing to start an agent in."""
        done = ask(["launchctl", "print", self._domain])
        if done.returncode:
            raise ServiceError(
                f"launchd has no session of yours at the screen ({said(done)}): log in there, and try again."
            )


def status_of(told: str, file: Path, log: Path) -> ServiceStatus:
    """From what `launchctl print` writes; empty where the agent is not loaded."""
    rows = dict(_ROW.findall(told))
    process_id, runs = rows.get("pid", ""), rows.get("runs", "")
    state = rows.get("state", "not loaded")
    return ServiceStatus(
        manager="launchd",
        file=str(file),
        is_installed=file.exists(),
        is_running=state == "running",
        state=state if file.exists() or told else NOT_INSTALLED,
        process_id=int(process_id) if process_id.isdecimal() else None,
        restarts=max(0, int(runs) - 1) if runs.isdecimal() else None,
        log_command=f"tail -f {log}",
    )
