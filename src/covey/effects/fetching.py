"""How a model file comes into a folder that several nodes share: fetched once, shown only when it is whole.

Beside the file lies a lock, and a work folder that holds what a source needs until the file is verified and moved
into place. Whoever finds the lock taken waits, and sees the other's progress by what grows in the work folder.
"""

import errno
import os
import shutil
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

from covey.control.placement.refusal import MEGABYTE, amount
from covey.effects.durable import LockedError, locked, sync_folder
from covey.effects.paths import make_private

POLL_MS: Final = 200  # of the lock, and of what has grown
# Of a disk: full, not ours, or not to be written to.
NEEDS_A_PERSON: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR})
FREE_BYTES_MIN: Final = 64 * 1024 * 1024  # a disk that is full to the brim breaks more than the download

Progress = Callable[[int, int], None]  # bytes done, of bytes in all
Fetch = Callable[[Path], Awaitable[Path]]


class FetchError(Exception):
    """A model's file can't be made present; the message is one sentence for a person.

    `is_final`: another try would end alike, until a person does something about it. `is_damaged`: and it would fetch
    everything again, since what came is not what was to come.
    """

    def __init__(self, message: str, *, is_final: bool = False, is_damaged: bool = False) -> None:
        super().__init__(message)
        self.is_final = is_final or is_damaged
        self.is_damaged = is_damaged


class HubError(FetchError):
    """The hub has not what was asked for, or can't be asked. `status` is the HTTP status that fits."""

    def __init__(self, message: str, status: int, *, is_final: bool = False, is_damaged: bool = False) -> None:
        is_ours = status < HTTPStatus.INTERNAL_SERVER_ERROR
        super().__init__(message, is_final=is_final or is_ours, is_damaged=is_damaged)
        self.status = status


def is_present(path: Path, file_bytes: int) -> bool:
    """A file comes to its place only after its hash was checked, so that later a look at its size is enough."""
    try:
        return path.stat().st_size == file_bytes
    except OSError:
        return False


async def make_present(path: Path, file_bytes: int, progress: Progress, fetch: Fetch) -> None:
    """Makes the file of `file_bytes` present at `path`. Raises `FetchError`.

    `fetch` is given the work folder, where things of an earlier try may lie, and returns the verified file in it.
    """
    if is_present(path, file_bytes):
        return
    failures: list[FetchError] = []  # the task group would wrap what is raised through it
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_watch, path, file_bytes, progress)
        try:
            await _fetch_alone(path, file_bytes, fetch)
        except FetchError as error:
            failures.append(error)
        except OSError as error:
            message = f"the model can't be stored in {path.parent}: {error.strerror or error}"
            failures.append(FetchError(message, is_final=error.errno in NEEDS_A_PERSON))
        tasks.cancel_scope.cancel()
    for failure in failures:
        raise failure


def expect_space(folder: Path, needed_bytes: int, needed_for: str) -> None:
    """Raises `FetchError` when the disk has no room for `needed_bytes` more. `needed_for`: what they are, in words."""
    free_bytes = shutil.disk_usage(folder).free
    missing_bytes = needed_bytes + FREE_BYTES_MIN - free_bytes
    if missing_bytes > 0:
        raise FetchError(
            f"the disk of {folder} has {amount(free_bytes)} free, {amount(missing_bytes + MEGABYTE - 1)} too few: this "
            f"model needs {amount(needed_bytes)}, for {needed_for}, and {amount(FREE_BYTES_MIN)} are to stay free; "
            "free some space, or move all data with COVEY_HOME",
            is_final=True,
        )


def _work_folder(path: Path) -> Path:
    return path.parent / "fetching"


def expect_no_folder(*paths: Path) -> None:
    """Raises `FetchError` where a folder lies in the place of a file: nothing is fetched in vain."""
    for path in paths:
        if path.is_dir():
            raise _in_the_way(path)


def _expect_no_file(*paths: Path) -> None:
    """The same where a file lies in the place of a folder."""
    for path in paths:
        if path.exists() and not path.is_dir():
            raise _in_the_way(path)


def _in_the_way(path: Path) -> FetchError:
    return FetchError(f"{path} is in the way of this model's file; move it away", is_final=True)


async def _fetch_alone(path: Path, file_bytes: int, fetch: Fetch) -> None:
    lock, work = path.parent / "lock", _work_folder(path)
    _expect_no_file(path.parent, work)
    expect_no_folder(path, lock)
    make_private(path.parent)
    with ExitStack() as held:
        await _lock(held, lock)
        if is_present(path, file_bytes):  # another process fetched it while we waited
            return
        work.mkdir(exist_ok=True)
        whole = await fetch(work)
        if not is_present(whole, file_bytes):
            message = f"the file fetched for {path.name} does not have the {file_bytes} bytes that it should"
            raise FetchError(message, is_damaged=True)
        await anyio.to_thread.run_sync(_settle, whole, path, work)


async def _lock(held: ExitStack, path: Path) -> None:
    """Waits for as long as another process fetches the file."""
    while True:
        try:
            held.enter_context(locked(path))
        except LockedError:
            await anyio.sleep(POLL_MS / 1000)
        else:
            return


def _settle(whole: Path, path: Path, work: Path) -> None:
    """On disk first, in sight afterwards."""
    with whole.open("rb") as file:
        os.fsync(file.fileno())
    whole.replace(path)
    sync_folder(path.parent)
    shutil.rmtree(work, ignore_errors=True)


async def _watch(path: Path, file_bytes: int, progress: Progress) -> None:
    """The largest file counts: the package first, then what is unpacked from it; never all, and never backwards."""
    most_bytes = 0
    while True:
        sizes = await anyio.to_thread.run_sync(_sizes, _work_folder(path))
        most_bytes = max(most_bytes, min(max(sizes, default=0), file_bytes))
        progress(most_bytes, file_bytes)
        await anyio.sleep(POLL_MS / 1000)


def _sizes(folder: Path) -> list[int]:
    sizes: list[int] = []
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # gone between the two looks
                sizes.append((Path(parent) / name).stat().st_size)
    return sizes
