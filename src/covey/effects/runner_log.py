"""What a runner writes to its standard error: the last lines for whoever asks why, and a bounded file."""

import logging
from collections import deque
from pathlib import Path
from typing import BinaryIO, Final

LINES_MAX: Final = 40
LINE_CHARACTERS_MAX: Final = 500
FILE_BYTES_MAX: Final = 1024 * 1024
FILES_MAX: Final = 20

_log = logging.getLogger(__name__)


class RunnerLog:
    """One file for each runner. What is past its limit is not written; the last lines are always kept in memory."""

    def __init__(self, folder: Path, runner_id: str) -> None:
        self._lines: deque[str] = deque(maxlen=LINES_MAX)
        self._partial = b""
        self._file = _opened(folder, runner_id)
        self._room_bytes = FILE_BYTES_MAX - (self._file.tell() if self._file else 0)

    def write(self, data: bytes) -> None:
        *lines, self._partial = (self._partial + data).split(b"\n")
        self._lines.extend(_text(line) for line in lines if line.strip())
        self._partial = self._partial[-LINE_CHARACTERS_MAX:]
        if self._file is not None and self._room_bytes > 0:
            self._write_file(self._file, data)

    def tail(self) -> str:
        last = [_text(self._partial)] if self._partial.strip() else []
        return "\n".join([*self._lines, *last][-LINES_MAX:])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write_file(self, file: BinaryIO, data: bytes) -> None:
        try:
            file.write(data[: self._room_bytes])
        except OSError as error:  # a full disk must not end the runner
            _log.warning("the log of a runner can't be written: %s", error)
            self._room_bytes = 0
        self._room_bytes -= len(data)


def _text(line: bytes) -> str:
    return line.decode(errors="replace").rstrip()[:LINE_CHARACTERS_MAX]


def _opened(folder: Path, runner_id: str) -> BinaryIO | None:
    """The runner's file, added to by its later attempts; the oldest files make room."""
    name = "".join(character if character.isalnum() or character in "-_" else "_" for character in runner_id)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        logs = sorted(folder.glob("runner-*.log"), key=lambda path: path.stat().st_mtime)
        for old in logs[: max(0, len(logs) - FILES_MAX + 1)]:
            old.unlink(missing_ok=True)
        return (folder / f"runner-{name}.log").open("ab", buffering=0)
    except OSError as error:
        _log.warning("no log of the runner is kept: %s", error)
        return None
