"""Which service manager this system has. Nothing of it is changed but this one service."""

import sys
from typing import Protocol

from covey.desktop.launchd import Launchd
from covey.desktop.service import Service, ServiceStatus
from covey.desktop.systemd import Systemd


class Manager(Protocol):
    """All raise `ServiceError`."""

    def install(self, service: Service) -> bool:
        """Writes the file, and starts the service anew with it. True if it was not there."""
        ...

    def uninstall(self) -> bool:
        """Stops the service and removes its file, whichever of the two is left. False if there was neither."""
        ...

    def status(self) -> ServiceStatus: ...


def manager() -> Manager:
    """The one of this system."""
    return Launchd() if sys.platform == "darwin" else Systemd()
