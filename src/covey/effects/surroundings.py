"""What a person might be asked about this machine when something is wrong. Looked at, never changed."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Final

import psutil
from msgspec import Struct

CONTAINER_FILES: Final = (Path("/.dockerenv"), Path("/run/.containerenv"))
NVIDIA_FILES: Final = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"))
UFW_FILE: Final = Path("/etc/ufw/ufw.conf")
FIREWALL_PROGRAMS: Final = ("firewalld", "opensnitchd")
MAC_FIREWALL: Final = "/usr/libexec/ApplicationFirewall/socketfilterfw"
ANSWER_S_MAX: Final = 5.0
PASSING_BITS: Final = 0o011  # of a folder: its group, or all, reach what is in it by name


class Folder(Struct, frozen=True, kw_only=True):
    """A folder that is to be, or the nearest one above it that is there: `path`."""

    path: Path
    is_folder: bool
    is_writable: bool
    owner: int  # user id
    mode: int  # permission bits
    is_in_reach: bool  # for other users: the folders above let somebody else pass
    device: int  # equal for folders on one disk
    bytes_free: int
    files_free: int | None  # None where the file system sets no limit


def folder(wanted: Path) -> Folder:
    """Raises `OSError`."""
    path = wanted
    while not _can_be_seen(path) and path != path.parent:
        path = path.parent
    status, disk = path.stat(), os.statvfs(path)
    return Folder(
        path=path,
        is_folder=path.is_dir(),
        is_writable=os.access(path, os.W_OK | os.X_OK) and not disk.f_flag & os.ST_RDONLY,
        owner=status.st_uid,
        mode=status.st_mode & 0o777,
        is_in_reach=all(each.stat().st_mode & PASSING_BITS for each in path.resolve().parents),
        device=status.st_dev,
        bytes_free=disk.f_bavail * disk.f_frsize,
        files_free=disk.f_favail if disk.f_files else None,
    )


def _can_be_seen(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a folder above it is not ours to enter
        return False


def listener_at(port: int) -> str:
    """The program that listens at this TCP port; empty where there is none, or nobody tells us."""
    try:
        found = [each.pid for each in psutil.net_connections("tcp") if _listens(each, port) and each.pid]
        return f"{psutil.Process(found[0]).name()} (process {found[0]})" if found else ""
    except (psutil.Error, OSError):
        return ""


def _listens(connection: object, port: int) -> bool:
    address = getattr(connection, "laddr", None)
    return getattr(connection, "status", "") == psutil.CONN_LISTEN and getattr(address, "port", None) == port


def open_files_max() -> int:
    """What this process may hold open at a time."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def gpu() -> str:
    """What could compute beside the processor; empty where nothing is seen."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return "an Apple GPU"
    return "an NVIDIA GPU" if any(path.exists() for path in NVIDIA_FILES) else ""


def engine_failure() -> str:
    """Why the library that computes can't be loaded; empty if it can. Takes a second."""
    code = "import onnxruntime"  # in a process of its own: a library may end the one that loads it
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter
            [sys.executable, "-P", "-c", code],
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1] if done.returncode else ""


def is_container() -> bool:
    return any(path.exists() for path in CONTAINER_FILES) or bool(os.environ.get("container"))  # noqa: SIM112 - its name


def firewall() -> str:
    """One that is switched on; empty where none is seen. What it lets through is for administrators to see."""
    if sys.platform == "darwin":
        return "the firewall of macOS" if "enabled" in _told([MAC_FIREWALL, "--getglobalstate"]) else ""
    if "ENABLED=yes" in _text(UFW_FILE).splitlines():
        return "ufw"
    running = {each.info["name"] for each in psutil.process_iter(["name"])}
    return next((name for name in FIREWALL_PROGRAMS if name in running), "")


def _told(command: list[str]) -> str:
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=ANSWER_S_MAX)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
