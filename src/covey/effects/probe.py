"""What this machine is and what it has left: memory, processor, disk, addresses.

`Probe.hardware()` is cheap enough for every few seconds, but reads files, so it runs in a thread.
Inside a container the limits that hold for it count, not what the host has.
"""

import hashlib
import os
import platform
import socket
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil

from covey.effects import control_groups
from covey.schema.cluster import Hardware

_MACHINE_ID_FILES: Final = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
_MODEL_FILES: Final = (Path("/sys/class/dmi/id/product_name"), Path("/sys/firmware/devicetree/base/model"))
_PROCESSOR_FILE: Final = Path("/proc/cpuinfo")
_PROCESSOR_LABELS: Final = ("model name", "Model", "Hardware")  # x86, then what small boards say


class Probe:
    """`disk_folder`: whose disk counts, the one that model files go to."""

    def __init__(self, disk_folder: Path) -> None:
        self._disk_folder = disk_folder
        self._machine_id = machine_id()
        self._machine_model = _machine_model()
        self._processor = _processor()
        self._os_name, self._os_version = _system()

    def hardware(self) -> Hardware:
        memory, swap = psutil.virtual_memory(), psutil.swap_memory()
        disk = psutil.disk_usage(str(_existing(self._disk_folder)))
        limited = control_groups.memory_room()
        return Hardware(
            machine_id=self._machine_id,
            machine_model=self._machine_model,
            processor=self._processor,
            physical_cores=control_groups.core_count(),
            logical_cores=control_groups.processor_count(),
            os_name=self._os_name,
            os_version=self._os_version,
            memory_bytes_total=min([memory.total, *(room.limit_bytes for room in limited)]),
            memory_bytes_available=min([memory.available, *(room.free_bytes for room in limited)]),
            swap_bytes_total=swap.total,
            swap_bytes_available=swap.free,
            disk_bytes_total=disk.total,
            disk_bytes_available=disk.free,
            interfaces=_interfaces(),
        )

    @staticmethod
    def resident_bytes(process_ids: Sequence[int]) -> dict[int, int]:
        """What each of these processes holds of the memory. One that has ended is left out."""
        found: dict[int, int] = {}
        for process_id in process_ids:
            with suppress(psutil.NoSuchProcess):
                found[process_id] = psutil.Process(process_id).memory_info().rss
        return {process_id: count for process_id, count in found.items() if count}  # none: ended, and not reaped yet


def machine_id() -> str:
    """Equal for two nodes on one machine, told to others; the machine's own identifier can't be had from it."""
    raw = next((text for path in _MACHINE_ID_FILES if (text := _read(path))), f"{uuid.getnode():x}")
    return hashlib.sha256(f"covey machine {raw} {socket.gethostname()}".encode()).hexdigest()[:32]


def _interfaces() -> tuple[tuple[str, str], ...]:
    """(name, address) of the interfaces that are up, without scope suffixes."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    return tuple(
        (name, address.address.partition("%")[0])
        for name, addresses in sorted(psutil.net_if_addrs().items())
        for address in addresses
        if name in up and address.family in {socket.AF_INET, socket.AF_INET6}
    )


def _system() -> tuple[str, str]:
    if platform.system() == "Darwin":
        return "macOS", platform.mac_ver()[0]
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return platform.system(), platform.release()
    return release.get("NAME", platform.system()), release.get("VERSION_ID", platform.release())


def _machine_model() -> str:
    known = next((text for path in _MODEL_FILES if (text := _read(path))), "")
    return known or platform.machine()


def _processor() -> str:
    rows = [line.partition(":") for line in _read(_PROCESSOR_FILE).splitlines()]
    values = {label.strip(): value.strip() for label, _, value in rows}
    known = next((values[label] for label in _PROCESSOR_LABELS if label in values), "")
    return known or platform.processor() or platform.machine()


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip().strip("\0")
    except OSError:
        return ""


def _existing(folder: Path) -> Path:
    """The folder or its nearest parent that is there already."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def loopback_interface() -> str:
    """The name of the interface that reaches only this machine: "lo" on Linux, "lo0" on macOS."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == "127.0.0.1" for address in addresses):
            return name
    return "lo"


def user_name() -> str:
    """Tells users of one machine apart."""
    return str(os.getuid())
