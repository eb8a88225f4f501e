"""Fetches files from a Hugging Face hub: where they are, their header alone, or all, resumed where it broke.

`huggingface_hub` knows the addresses, the tokens, and what an answer means; HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE
count. The bytes are read by a client of our own, since its downloads cannot be cancelled.
"""

import hashlib
import os
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Final

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # before the library reads it

import anyio
import anyio.from_thread
import anyio.to_thread
import httpx2
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers
from msgspec import Struct

from covey.checkpoints.checkpoint import Checkpoint
from covey.checkpoints.gguf_file import HeaderIncompleteError, parse_header
from covey.effects.fetching import HubError, expect_no_folder, expect_space
from covey.schema.model import HubSource

CONNECT_S_MAX: Final = 10.0
SILENCE_S_MAX: Final = 30.0  # between two pieces; a whole file may take as long as it needs
TRIES_MAX: Final = 4  # in a row without a new byte
PAUSE_S_FIRST: Final = 1.0
PAUSE_S_MAX: Final = 30.0
HEADER_BYTES_FIRST: Final = 1024 * 1024
HASH_CHUNK_BYTES: Final = 1024 * 1024
# What we answer when the hub answers so; 502 otherwise.
_STATUS_OF: Final[dict[int, int]] = {401: 404, 403: 403, 404: 404, 429: 503}
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


class ShortAnswerError(httpx2.HTTPError):
    """An answer that is whole, but too short: of a login page in between, or of a broken mirror."""


class HubFile(Struct, frozen=True):
    source: HubSource  # pinned to a commit, so that all nodes fetch the same bytes
    file_bytes: int
    sha256: str | None  # large files have one


async def locate(source: HubSource) -> HubFile:
    """Asks the hub for a file's commit, size and hash. Raises `HubError`."""
    try:
        found = await anyio.to_thread.run_sync(
            lambda: get_hf_file_metadata(_url(source), timeout=CONNECT_S_MAX), abandon_on_cancel=True
        )
    except (httpx2.HTTPError, EntryNotFoundError, HFValidationError, OfflineModeIsEnabled) as error:
        raise _explained(source, error) from None
    if found.size is None:
        raise HubError(f"the hub does not say how large {_name(source)} is, so it can't be fetched", 502)
    pinned = HubSource(source.repository, source.file, found.commit_hash or source.revision)
    sha256 = found.etag if found.etag and _SHA256.fullmatch(found.etag) else None
    return HubFile(pinned, found.size, sha256)


async def fetch_header(file: HubFile) -> Checkpoint:
    """The file's header, by as few bytes as it takes. Raises `HubError`, `CheckpointError`."""
    data = bytearray()
    wanted = HEADER_BYTES_FIRST
    async with _client() as client:
        while True:
            await _extend(client, file, data, min(wanted, file.file_bytes))
            try:
                return await anyio.to_thread.run_sync(parse_header, bytes(data), file.file_bytes)
            except HeaderIncompleteError as incomplete:
                wanted = max(incomplete.bytes_needed, 2 * len(data))


async def fetch_from_hub(file: HubFile, work: Path) -> Path:
    """The whole file in `work`, going on where an earlier try ended. Raises `FetchError`, `OSError`."""
    part = work / "model"
    expect_no_folder(part)
    start = furthest = _size(part)
    expect_space(work, file.file_bytes - start, "what is to come of its file")
    tries = 0
    async with _client() as client:
        while start != file.file_bytes:
            try:
                await _fetch_rest(client, file, part, start)
            except httpx2.HTTPError as error:
                tries = tries + 1 if _size(part) <= furthest else 1
                if tries >= TRIES_MAX or not _may_pass(error):
                    raise _explained(file.source, error) from None
                await anyio.sleep(_pause_s(error, tries))
            start = _size(part)
            furthest = max(furthest, start)
    await anyio.to_thread.run_sync(_expect_hash, part, file)
    return part


async def _fetch_rest(client: httpx2.AsyncClient, file: HubFile, part: Path, start: int) -> None:
    """Adds to `part`, which has `start` bytes, what it lacks; a server that ignores ranges makes it begin anew."""
    size = start if start < file.file_bytes else 0
    async with _ranged(client, file, size, file.file_bytes - 1) as response:
        size = size if response.status_code == HTTPStatus.PARTIAL_CONTENT else 0
        async with await anyio.open_file(part, "ab" if size else "wb") as output:
            async for chunk in response.aiter_bytes():
                size += len(chunk)
                if size > file.file_bytes:
                    raise _resized(file, size)
                await output.write(chunk)
    if size < file.file_bytes:
        raise ShortAnswerError(f"the hub sent only {size} of the {file.file_bytes} bytes of {_name(file.source)}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


async def _extend(client: httpx2.AsyncClient, file: HubFile, data: bytearray, target_bytes: int) -> None:
    try:
        async with _ranged(client, file, len(data), target_bytes - 1) as response:
            if response.status_code != HTTPStatus.PARTIAL_CONTENT:
                data.clear()
            async for chunk in response.aiter_bytes():
                data += chunk
                if len(data) >= target_bytes:
                    return
    except httpx2.HTTPError as error:
        raise _explained(file.source, error) from None
    raise HubError(f"the hub sent only {len(data)} bytes of the header of {_name(file.source)}; try again", 502)


@asynccontextmanager
async def _ranged(client: httpx2.AsyncClient, file: HubFile, first: int, last: int) -> AsyncGenerator[httpx2.Response]:
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={first}-{last}"}
    async with client.stream("GET", _url(file.source), headers=headers) as response:
        response.raise_for_status()
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        if total.isdigit() and int(total) != file.file_bytes:
            raise _resized(file, int(total))
        yield response


def _client() -> httpx2.AsyncClient:
    timeout = httpx2.Timeout(SILENCE_S_MAX, connect=CONNECT_S_MAX)
    return httpx2.AsyncClient(timeout=timeout, follow_redirects=True)


def _url(source: HubSource) -> str:
    endpoint = os.environ.get("HF_ENDPOINT") or None
    return hf_hub_url(source.repository, source.file, revision=source.revision, endpoint=endpoint)


def _name(source: HubSource) -> str:
    return f"hf:{source.repository}/{source.file}"


def _expect_hash(path: Path, file: HubFile) -> None:
    """What does not match is of no use for going on, so it is removed."""
    if file.sha256 is None:
        return
    digest = hashlib.sha256()
    with path.open("rb") as content:
        while chunk := content.read(HASH_CHUNK_BYTES):
            anyio.from_thread.check_cancelled()
            digest.update(chunk)
    if digest.hexdigest() != file.sha256:
        path.unlink()
        raise HubError(f"what came for {_name(file.source)} is damaged: its SHA-256 differs", 502, is_damaged=True)


# ---- what went wrong ----


def _resized(file: HubFile, size: int) -> HubError:
    message = f"{_name(file.source)} has {size} bytes, not the {file.file_bytes} that the hub told before"
    return HubError(message, 502, is_final=True)


def _status(error: Exception) -> int:
    """Of the hub's answer; 0 if there was none."""
    is_answer = isinstance(error, httpx2.HTTPStatusError | HfHubHTTPError)
    response = getattr(error, "response", None) if is_answer else None
    return response.status_code if response is not None else 0


def _may_pass(error: httpx2.HTTPError) -> bool:
    """Worth another try: no answer, a broken one, a tired server."""
    return _status(error) in {0, 408, 429} or _status(error) >= HTTPStatus.INTERNAL_SERVER_ERROR


def _pause_s(error: httpx2.HTTPError, tries: int) -> float:
    """Doubles with each try, unless the server names a time."""
    named = error.response.headers.get("Retry-After", "") if isinstance(error, httpx2.HTTPStatusError) else ""
    pause_s = float(named) if named.isdigit() else PAUSE_S_FIRST * 2 ** (tries - 1)
    return min(pause_s, PAUSE_S_MAX)


def _explained(source: HubSource, error: Exception) -> HubError:
    name, status = _name(source), _status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return HubError(f"{name} can't be looked up because HF_HUB_OFFLINE is set; unset it", 503, is_final=True)
    if isinstance(error, HFValidationError):
        return HubError(f"{name} can't be a file on a hub: {error}", 400)
    if isinstance(error, RevisionNotFoundError):
        return HubError(f"{source.repository} has no revision {source.revision!r} on the hub", 404)
    if isinstance(error, ShortAnswerError):
        return HubError(f"{error}; check that no login page or proxy answers in its place, then try again", 502)
    if status:
        return HubError(f"{name} {_answer(error, status)}", _STATUS_OF.get(status, 502))
    reason = str(error) or type(error).__name__
    return HubError(f"the hub can't be reached for {name} ({reason}); check the network connection", 503)


def _answer(error: Exception, status: int) -> str:
    """What the hub's error answer means, after the name of the file."""
    if isinstance(error, GatedRepoError) or status == HTTPStatus.FORBIDDEN:
        return "needs its owner's permission; ask for it on the hub, and set HF_TOKEN"
    if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.NOT_FOUND}:
        return "is not on the hub; check owner, repository and file, or set HF_TOKEN if it is private"
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "can't be had for now, since the hub has been asked too often; try again in some minutes"
    return f"can't be had: the hub answered with an error (HTTP status {status}); try again later"
