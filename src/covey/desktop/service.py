"""What a node is as a service, whoever starts it. The files in which that is written are rendered beside this one."""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct

from covey.control.deadlines import REAP_MS
from covey.effects.time_limits import TimeLimitError, leave_s_max, time_limits

DESCRIPTION: Final = "Covey node"
WRONG_USAGE_EXIT: Final = 2  # of every command: another try would end the same way
OPEN_FILES_MAX: Final = 8192  # macOS gives a service 256; each client, peer and runner takes some
END_ROOM_S: Final = 8  # beside the time to end and for killed runners to go: a machine that swaps is slow
NOT_INSTALLED: Final = "not installed"
KEPT_VARIABLES: Final = ("COVEY_CLUSTER",)
KEPT_ENDINGS: Final = ("_TIMEOUT_S",)  # of variables that begin with COVEY_; what is secret is not among them


class ServiceError(Exception):
    """The service can't be installed, removed or looked at; the message is whole sentences for a person."""


class Service(Struct, frozen=True, kw_only=True):
    """`command`: an absolute path, then its arguments. `environment`: beside what every service of the user has.
    `end_s`: what it may take to end before it is killed.
    """

    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    end_s: int


class ServiceStatus(Struct, frozen=True, kw_only=True):
    """`restarts` and `since` are None where the service manager does not tell."""

    manager: str  # "systemd" or "launchd"
    file: str
    is_installed: bool
    is_running: bool = False
    state: str = NOT_INSTALLED  # else in the manager's own words
    process_id: int | None = None
    since: str | None = None  # by the manager's clock
    restarts: int | None = None
    log_command: str


def node_service(up_arguments: Sequence[str], home: Path, environment: Mapping[str, str]) -> Service:
    """`covey up` with these options, by the interpreter that runs now, and with the data in `home`.

    Nothing secret is taken along: any program of the user can read a service's file. Raises `ServiceError` where a
    limit of time can't be used.
    """
    try:
        leave_s = leave_s_max(time_limits(environment))
    except TimeLimitError as error:
        raise ServiceError(f"{error}.") from None
    own = (sys.executable, "-P", "-m", "covey.cli", "up")  # -P: the folder where it starts is not searched for modules
    return Service(
        command=(*own, *up_arguments),
        environment=(("COVEY_HOME", os.fspath(home)), *kept_environment(environment)),
        end_s=math.ceil(leave_s + REAP_MS / 1000 + END_ROOM_S),
    )


def kept_environment(environment: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The variables of `covey up` that matter as much at the next start: no secret, nothing of a client's."""
    return tuple((name, value) for name, value in sorted(environment.items()) if value and _is_kept(name))


def _is_kept(name: str) -> bool:
    return name in KEPT_VARIABLES or (name.startswith("COVEY_") and name.endswith(KEPT_ENDINGS))
