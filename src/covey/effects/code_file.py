"""The join code of this user on this machine: one file, which all of the user's nodes here share.

It is made at the first start. A file that can't be read is an error with a sentence, never a reason for a new code:
the other devices would be strangers at once.
"""

import logging
from pathlib import Path
from typing import Final

from msgspec import Struct

from covey.control import join_code
from covey.control.join_code import JoinCode, JoinCodeError
from covey.effects.durable import locked, write_durably
from covey.effects.paths import make_private
from covey.effects.trust import new_join_code

CODE_FILE: Final = "join-code"
FORMER_FILE: Final = "join-code.former"
ROTATIONS_FILE: Final = "join-code.rotations"  # a line for each, the latest last: new code, former one, `ENDS_KEYS`
ENDS_KEYS: Final = "ends-keys"
ROTATIONS_MAX: Final = 64  # for a node that was off during all of them
LOCK_FILE: Final = "join-code.lock"

_log = logging.getLogger(__name__)


class Former(Struct, frozen=True):
    """A code that a rotation replaced. `ends_keys`: API keys of that time are not valid any more."""

    code: JoinCode
    ends_keys: bool = False


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


def replace_code(folder: Path, code: JoinCode, successor_of: Former | None = None) -> Path | None:
    """From now on this code; the former one is kept aside, where the answer says.

    `successor_of`: the code that a rotation replaced by this one, which `former_codes` tells from then on. Raises
    `CodeFileError`: then nothing has changed.
    """
    try:
        make_private(folder)
        with locked(folder / LOCK_FILE, waits=True):
            former = folder / CODE_FILE
            before = former.read_bytes() if former.exists() else _content(code)  # as it is: it may be damaged
            if successor_of is not None:
                _note(folder, code, successor_of)
            if before != _content(code):
                write_durably(folder / FORMER_FILE, before)
            _write(folder, code)  # last: whoever starts with it finds all the rest
            return None if before == _content(code) else folder / FORMER_FILE
    except OSError as error:
        raise _unusable(folder, error) from None


def former_codes(folder: Path, code: JoinCode) -> tuple[Former, ...]:
    """What rotations replaced until it was `code`, the latest first. Raises `CodeFileError`."""
    try:
        former_of = _rotations(folder)
    except OSError as error:
        raise _unusable(folder, error) from None
    found: list[Former] = []
    ends_keys = False
    while (former := former_of.pop(code, None)) is not None:
        ends_keys = ends_keys or former.ends_keys  # of the codes before it, too
        found.append(Former(former.code, ends_keys))
        code = former.code
    return tuple(found)


def _note(folder: Path, code: JoinCode, former: Former) -> None:
    """A note whose code was never taken into use does no harm: nobody starts with that code."""
    known = _rotations(folder)
    known.pop(code, None)
    known[code] = former
    lines = [f"{_line(new, old)}\n" for new, old in known.items()]
    write_durably(folder / ROTATIONS_FILE, "".join(lines[-ROTATIONS_MAX:]).encode())


def _line(code: JoinCode, former: Former) -> str:
    return " ".join([code.text(), former.code.text(), *([ENDS_KEYS] if former.ends_keys else [])])


def _rotations(folder: Path) -> dict[JoinCode, Former]:
    """By the code that came, in order."""
    path = folder / ROTATIONS_FILE
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    found: dict[JoinCode, Former] = {}
    for line in lines:
        new, _, rest = line.partition(" ")
        old, _, mark = rest.partition(" ")
        try:
            found[join_code.parse(new)] = Former(join_code.parse(old), mark == ENDS_KEYS)
        except JoinCodeError:
            _log.warning("%s is damaged: it no longer tells all former join codes of this cluster", path)
    return found


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
