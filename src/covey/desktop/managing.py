"""The commands of the system's service manager, and the file that it reads."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from covey.desktop.service import ServiceError

ANSWER_S_MAX: Final = 120.0  # a node that is stopped may take its time
ELSE: Final = (
    "In a container, let its runtime start `covey up` and restart it (docker: --restart unless-stopped); elsewhere, "
    "whatever keeps programs running there."
)


def ask(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs it. Raises `ServiceError` where there is no such program, or it does not end."""
    try:
        return subprocess.run(  # noqa: S603 - our own words, and paths that we made
            command,
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=ANSWER_S_MAX,
        )
    except OSError:
        raise ServiceError(f"There is no {command[0]} here, so nothing can keep a service. {ELSE}") from None
    except subprocess.TimeoutExpired:
        raise ServiceError(f"`{' '.join(command)}` did not end within {ANSWER_S_MAX:.0f} s; try again.") from None


def demand(command: Sequence[str]) -> str:
    """What it wrote. Raises `ServiceError` also where it fails."""
    done = ask(command)
    if done.returncode:
        raise ServiceError(f"`{' '.join(command)}` failed: {said(done)}.")
    return done.stdout


def said(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").rstrip(".")


def write_file(path: Path, content: bytes) -> bool:
    """True if it was not there. Raises `ServiceError`."""
    try:
        is_new = not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise ServiceError(f"{path} can't be written ({error.strerror or error}); check its permissions.") from None
    return is_new


def remove_file(path: Path) -> bool:
    """False if it was not there. Raises `ServiceError`."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ServiceError(f"{path} can't be removed ({error.strerror or error}); check its permissions.") from None
    return True
