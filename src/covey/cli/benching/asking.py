"""Requests over a server's OpenAI-compatible stream, with the time at which each piece of text came.

It is the standard library's client, not the one of the other commands, and it parses what came when all has come: the
client runs on the server's machine, and what it takes of the processor the server lacks.
"""

import json
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from covey.cli.client import CliError

SILENCE_SECONDS_MAX: Final = 600.0  # a long prompt on a small board, of which some servers say nothing
PATH: Final = "/v1/chat/completions"
DONE: Final = b"[DONE]"


class Server(Struct, frozen=True):
    """Whom to ask for what."""

    name: str
    url: str
    model_id: str
    headers: dict[str, str] = {}


class Sample(Struct, frozen=True, kw_only=True):
    """One answer. Times are in seconds since its round began."""

    sent_s: float
    pieces_s: tuple[float, ...]  # when each piece of text came: mostly a token, more where a character takes several
    ended_s: float
    prompt_tokens: int
    cached_tokens: int  # of the prompt's
    new_tokens: int


# What is read of a chunk.


class _Delta(Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _Details(Struct):
    cached_tokens: int = 0


class _Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Details | None = None


class _Error(Struct):
    message: str


class _Chunk(Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None

    @property
    def has_text(self) -> bool:
        return any(choice.delta.content or choice.delta.reasoning_content for choice in self.choices)


_chunks = msgspec.json.Decoder(_Chunk)
Came = list[tuple[float, bytes]]  # what was read, and when


def ask_together(
    server: Server, prompts: Sequence[str], new_tokens: int, also: Mapping[str, Any] = MappingProxyType({})
) -> tuple[Sample, ...]:
    """Asks all at once, each over a connection of its own, and waits for the last. `also` is sent beside what is asked
    always. Raises `CliError`.

    However it ends, no request goes on.
    """
    streams = [_Stream(server) for _ in prompts]
    bodies = [_body(server, prompt, new_tokens, also) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as threads:
        try:
            for stream in streams:
                stream.connect()
            began = time.perf_counter()
            asked = [threads.submit(stream.ask, body, began) for stream, body in zip(streams, bodies, strict=True)]
            for each in wait(asked, return_when=FIRST_EXCEPTION).done:
                _answer(server, each)
            return tuple(each.result() for each in asked)
        finally:
            for stream in streams:
                stream.close()


def _answer(server: Server, asked: "Future[Sample]") -> None:
    """Raises `CliError` if there is none."""
    try:
        asked.result()
    except (OSError, HTTPException) as error:
        raise CliError(f"{server.name} at {server.url} broke off: {error or type(error).__name__}.") from None
    except msgspec.DecodeError as error:
        raise CliError(f"{server.name} at {server.url} sent something that is no answer: {error}.") from None


def _body(server: Server, prompt: str, new_tokens: int, also: Mapping[str, Any]) -> bytes:
    """No end before the last token that is asked for, and tokens that are drawn: the likeliest ones soon repeat
    themselves, which a guess from the text so far makes fast, and nobody's text is like that. The settings are those
    that llama.cpp's server has by default, and draw from few tokens, as most people's do.
    """
    asked: dict[str, Any] = {
        "model": server.model_id,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": new_tokens,
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **also,
    }
    return json.dumps(asked).encode()


class _Stream:
    """One request over a connection of its own."""

    def __init__(self, server: Server) -> None:
        self._server = server
        parts = urlsplit(server.url)
        connect = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        assert parts.hostname, "an address with a host"
        self._connection = connect(parts.hostname, parts.port, timeout=SILENCE_SECONDS_MAX)
        self._socket: socket.socket | None = None

    def connect(self) -> None:
        """Raises `CliError`."""
        try:
            self._connection.connect()
        except OSError as error:
            reason = error.strerror or error
            raise CliError(f"{self._server.name} does not answer at {self._server.url}: {reason}.") from None
        self._socket = self._connection.sock
        self._connection.auto_open = 0  # once closed, it stays so

    def close(self) -> None:
        """Also while another thread reads: it ends with an error then."""
        if self._socket is not None:
            with suppress(OSError):  # it is closed
                self._socket.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def ask(self, body: bytes, began: float) -> Sample:
        """Raises `CliError`, `OSError`, `HTTPException`, `msgspec.DecodeError`."""
        sent_s = time.perf_counter() - began
        headers = {"Content-Type": "application/json", **self._server.headers}
        self._connection.request("POST", PATH, body, headers)
        with closing(self._connection.getresponse()) as response:
            came = list(_read(response, began))
        ended_s = time.perf_counter() - began
        if response.status >= 400:  # noqa: PLR2004 (HTTP)
            raise self._refused(b"".join(data for _, data in came), response.status)
        return self._sample(came, sent_s, ended_s)

    def _sample(self, came: Came, sent_s: float, ended_s: float) -> Sample:
        pieces_s: list[float] = []
        usage: _Usage | None = None
        for at_s, data in _events(came):
            chunk = _Chunk() if data == DONE else _chunks.decode(data)
            if chunk.error:
                raise CliError(f"{self._server.name} gave up: {chunk.error.message}")
            if chunk.has_text:
                pieces_s.append(at_s)
            usage = chunk.usage or usage
        if usage is None:
            raise CliError(f"{self._server.name} at {self._server.url} ended its answer without saying how long it is.")
        details = usage.prompt_tokens_details
        return Sample(
            sent_s=sent_s,
            pieces_s=tuple(pieces_s),
            ended_s=ended_s,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=details.cached_tokens if details else 0,
            new_tokens=usage.completion_tokens,
        )

    def _refused(self, body: bytes, status: int) -> CliError:
        """With the server's own sentence, if it has one."""
        try:
            error = _chunks.decode(body).error
        except (msgspec.DecodeError, UnicodeDecodeError):
            error = None
        return CliError(f"{self._server.name} refuses: {error.message if error else f'status {status}.'}")


def _read(response: HTTPResponse, began: float) -> Iterator[tuple[float, bytes]]:
    while data := response.read1():
        yield time.perf_counter() - began, data


def _events(came: Came) -> Iterator[tuple[float, bytes]]:
    """The data of each server-sent event, and when its line was whole."""
    rest = b""
    for at_s, data in came:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield at_s, line.removeprefix(b"data:").strip()
