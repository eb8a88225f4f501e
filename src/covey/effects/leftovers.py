"""Which processes a node has started, written down so that its next life ends those that outlived it.

A process number is used again for others. So a note holds the moment of the start and the boot of the machine too,
and what does not fit all three is left alone.
"""

import logging
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
import psutil
from msgspec import Struct

from covey.effects.paths import make_private

FOLDER: Final = "processes"
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
STARTED_S_APART_MAX: Final = 0.5  # of one process; both are counted from the boot, whatever the calendar says
BOOTED_S_APART_MAX: Final = 300.0  # of one boot, where only the calendar tells it
REAP_S: Final = 10.0

_log = logging.getLogger(__name__)


class Note(Struct, frozen=True):
    boot_id: str  # empty where the system has none
    booted_s: float  # by the calendar
    started_s: float  # after that


def note(folder: Path, process_id: int) -> None:
    """Writes down a process that was just started. Where that fails the kernel alone ends it with this node."""
    try:
        mark = _mark(psutil.Process(process_id))
        (make_private(folder / FOLDER) / str(process_id)).write_bytes(msgspec.json.encode(mark))
    except (psutil.Error, OSError) as error:
        _log.warning("process %d can't be written down: %s", process_id, error)


def forget(folder: Path, process_id: int) -> None:
    """It was reaped."""
    try:
        (folder / FOLDER / str(process_id)).unlink(missing_ok=True)
    except OSError as error:
        _log.warning("the note of process %d can't be removed: %s", process_id, error)


def end_leftovers(folder: Path) -> None:
    """Ends what an earlier life in this folder has left, and waits for its end."""
    notes = folder / FOLDER
    left = [each for path in (notes.iterdir() if notes.is_dir() else ()) if (each := _living(path))]
    for process in left:
        _log.warning("process %d is left of this node's earlier life; it is ended", process.pid)
        with suppress(psutil.Error):
            process.kill()
    _, staying = psutil.wait_procs(left, REAP_S)
    for process in staying:
        _log.error("process %d of this node's earlier life does not end; its memory stays taken", process.pid)
    for path in notes.iterdir() if notes.is_dir() else ():
        if path.name not in {str(process.pid) for process in staying}:
            with suppress(OSError):  # looked at again at the next start
                path.unlink()


def _living(path: Path) -> psutil.Process | None:
    """The process of a note, if it is the one that was noted."""
    try:
        noted = msgspec.json.decode(path.read_bytes(), type=Note)
        process = psutil.Process(int(path.name))
        mark = _mark(process)
    except (psutil.Error, OSError, msgspec.MsgspecError, ValueError):
        return None
    is_same_boot = noted.boot_id == mark.boot_id and (
        bool(mark.boot_id) or abs(noted.booted_s - mark.booted_s) < BOOTED_S_APART_MAX
    )
    return process if is_same_boot and abs(noted.started_s - mark.started_s) < STARTED_S_APART_MAX else None


def _mark(process: psutil.Process) -> Note:
    booted_s = psutil.boot_time()
    boot_id = BOOT_ID.read_text().strip() if sys.platform == "linux" and BOOT_ID.exists() else ""
    return Note(boot_id, booted_s, process.create_time() - booted_s)
