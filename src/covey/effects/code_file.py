"""The join code of this user on this machine: one file, which all of the user's nodes here share.

It is made at the first start. A file that can't be read is an error with a sentence, never a reason for a new code:
the other devices would be strangers at once.
"""

import logging
from pathlib import Path
from typing import Final

from covey.control import join_code
from covey.control.join_code import JoinCode, JoinCodeError
from covey.effects.durable import locked, write_durably
from covey.effects.paths import make_private
from covey.effects.trust import new_join_code

CODE_FILE: Final = "join-code"
FORMER_FILE: Final = "join-code.former"
LOCK_FILE: Final = "join-code.lock"

_log = logging.getLogger(__name__)


class CodeFileError(Exception):
    """The code can't be read or kept; the message is one sentence for a person."""


def kept_code(folder: Path) -> JoinCode:
    """The code in `folder`; a new one at the first start. Raises `CodeFileError`."""
    try:
        make_private(folder)
        with locked(folder / LOCK_FILE, waits=True):  # nodes that start at once agree on one
            found = _read(folder)
            return found or _write(folder, new_join_code())
    except OSError as error:
        raise _unusable(folder, error) from None


def known_code(folder: Path) -> JoinCode | None:
    """The code in `folder`, if there is one. Raises `CodeFileError`."""
    try:
        return _read(folder)
    except OSError as error:
        raise _unusable(folder, error) from None


def replace_code(folder: Path, code: JoinCode) -> Path | None:
    """From now on this code; the former one is kept aside, where the answer says. Raises `CodeFileError`."""
    try:
        make_private(folder)
        with locked(folder / LOCK_FILE, waits=True):
            former = folder / CODE_FILE
            before = former.read_bytes() if former.exists() else _content(code)  # as it is: it may be damaged
            _write(folder, code)
            if before == _content(code):
                return None
            write_durably(folder / FORMER_FILE, before)
            return folder / FORMER_FILE
    except OSError as error:
        raise _unusable(folder, error) from None


def _read(folder: Path) -> JoinCode | None:
    path = folder / CODE_FILE
    try:
        is_shared = path.stat().st_mode & 0o077
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return None
    if is_shared:
        path.chmod(0o600)
        _log.warning(
            "the join code in %s could be read by other users of this machine; now only you can. If you don't trust "
            "them, `covey join-code rotate` makes a new one",
            path,
        )
    try:
        return join_code.parse(text)
    except JoinCodeError:
        raise CodeFileError(
            f"the join code of this machine, {path}, is damaged; put it back with `covey up --join CODE` "
            "(`covey join-code` on another device shows it), or remove the file to begin a new cluster"
        ) from None


def _write(folder: Path, code: JoinCode) -> JoinCode:
    write_durably(folder / CODE_FILE, _content(code))
    return code


def _content(code: JoinCode) -> bytes:
    return f"{code.text()}\n".encode()


def _unusable(folder: Path, error: OSError) -> CodeFileError:
    return CodeFileError(
        f"the join code can't be kept in {folder} ({error.strerror or error}); "
        "check its permissions and the free space, or choose another folder with COVEY_HOME"
    )
