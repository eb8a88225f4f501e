"""The service under launchd, as an agent of the user who is logged in."""

import os
import re
import time
from pathlib import Path
from typing import Final

from covey.desktop.launch_agent import LABEL, agent, end_s
from covey.desktop.managing import ask, demand, remove_file, said, write_file
from covey.desktop.service import NOT_INSTALLED, Service, ServiceError, ServiceStatus

TRIES: Final = 20  # an agent that has just ended may still have its name
ROOM_S: Final = 10.0  # beside the time that a node may take to end
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
        wait_s = self._wait_s()
        is_new = write_file(self.file, agent(service, self.log))
        if not self._is_ended(wait_s):
            raise ServiceError(
                f"The service's file is written, but the former node has not ended within {wait_s:.0f} s: run the "
                "command again."
            )
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
        if not self.file.exists() and not self._is_loaded():
            return False
        wait_s = self._wait_s()
        is_ended = self._is_ended(wait_s)
        remove_file(self.file)
        if not is_ended:
            raise ServiceError(
                f"The service's file is removed, but launchd still has the node {wait_s:.0f} s after it was told to "
                f"end it: run the command again, or `launchctl bootout {self._target}`."
            )
        return True

    def _wait_s(self) -> float:
        """What the node that runs now may take to end, as its file says, and some room."""
        try:
            content = self.file.read_bytes()
        except OSError:
            content = b""
        return end_s(content) + ROOM_S

    def _is_ended(self, wait_s: float) -> bool:
        """Tells launchd to end it, and whether it has within this time."""
        ask(["launchctl", "bootout", self._target])  # it fails where none runs
        deadline = time.monotonic() + wait_s
        while is_there := self._is_loaded():
            if time.monotonic() > deadline:
                break
            time.sleep(TRY_S)
        return not is_there

    def _is_loaded(self) -> bool:
        return not ask(["launchctl", "print", self._target]).returncode

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
