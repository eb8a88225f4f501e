"""A launchd agent as a property list. The keys: launchd.plist(5)."""

import os
import plistlib
from pathlib import Path
from typing import Final
from xml.parsers.expat import ExpatError

from covey.desktop.bundle import BUNDLE_ID
from covey.desktop.service import OPEN_FILES_MAX, Service

LABEL: Final = "covey.node"
WAIT_S: Final = 10  # the least time between two starts
END_KEY: Final = "ExitTimeOut"
UNTOLD_END_S: Final = 30  # as long as a node takes by default


def agent(service: Service, log: Path) -> bytes:
    """The file's content. A node that ended with a failure is started again for ever; launchd can't tell one status
    from another, so the options are looked at before they are written here.

    The bundle's name lets macOS ask for the local network on behalf of the app that `covey launcher` makes.
    """
    return plistlib.dumps(
        {
            "Label": LABEL,
            "ProgramArguments": list(service.command),
            "EnvironmentVariables": dict(service.environment),
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": WAIT_S,
            END_KEY: service.end_s,
            "ProcessType": "Interactive",  # else its processor and disk are throttled as a chore's are
            "SoftResourceLimits": {"NumberOfFiles": OPEN_FILES_MAX},
            "StandardOutPath": os.fspath(log),
            "StandardErrorPath": os.fspath(log),
            "AssociatedBundleIdentifiers": [BUNDLE_ID],
        }
    )


def end_s(content: bytes) -> int:
    """What the agent of such a file may take to end, in seconds; the usual where it does not say."""
    try:
        told = plistlib.loads(content)
    except (plistlib.InvalidFileException, ExpatError, ValueError):
        return UNTOLD_END_S
    found = told.get(END_KEY) if isinstance(told, dict) else None
    return found if isinstance(found, int) else UNTOLD_END_S
