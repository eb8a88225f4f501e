"""A node's HTTP API as the commands need it. Everything that goes wrong becomes a `CliError` with one sentence."""

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import quote

import httpx2
import msgspec
from msgspec import Struct

from covey.api.cluster_changes import ClusterChange, applied
from covey.schema.cluster import ClusterState
from covey.schema.generation import GenerationEvent
from covey.schema.ids import NodeId
from covey.schema.trust import RotationOutcome

DEFAULT_PORT: Final = 52415
LOOPBACK: Final = "127.0.0.1"
DEFAULT_URL: Final = f"http://{LOOPBACK}:{DEFAULT_PORT}"
CONNECT_SECONDS_MAX: Final = 5.0
ANSWER_SECONDS_MAX: Final = 60.0  # a hub may have to be asked before a placement is answered
SILENCE_SECONDS_MAX: Final = 30.0  # streams say something every 10 s
SCHEMES: Final = ("http", "https")
PORT_MAX: Final = 65535
EVENTS_MAX: Final = 1000  # that a node keeps


class CliError(Exception):
    """What a person is told before the command ends with exit status 1."""


class NodeAwayError(CliError):
    """Nobody answers at the address."""


class WrongRequestError(CliError):
    """The request itself is refused: sent again as it is, it would be again."""


# What the commands read of an answer.


class _Model(Struct):
    id: str
    file_bytes: int
    quantization: str
    context_length: int
    downloaded: bool


class _Models(Struct):
    data: list[_Model]


class _Event(Struct):
    at: str
    text: str


class _Happened(Struct):
    events: list[_Event]


class _Key(Struct):
    key_id: str
    name: str
    created_s: int


class _Keys(Struct):
    keys: list[_Key]


class _MadeKey(Struct):
    key: str


class _RevokedKey(Struct):
    key_id: str


class _Previews(Struct):
    previews: list[dict[str, Any]]


class _Placed(Struct):
    """Also of an instance that was deleted."""

    instance_id: str
    on_one_node_only: bool


class _Message(Struct):
    message: str


class _Failed(Struct):
    error: _Message


class NodeClient:
    """The node at `url`, which may take so long for an answer. Use it as a context manager."""

    def __init__(self, url: str, answer_s_max: float = ANSWER_SECONDS_MAX) -> None:
        self.url = address(url)
        timeout = httpx2.Timeout(answer_s_max, connect=CONNECT_SECONDS_MAX)
        with self._explained():
            self._http = httpx2.Client(base_url=self.url, timeout=timeout, trust_env=False, headers=credentials())

    def __enter__(self) -> "NodeClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def cluster(self) -> ClusterState:
        """The cluster as the node sees it."""
        with self._explained():
            return msgspec.json.decode(self._checked(self._http.get("/cluster")).content, type=ClusterState)

    def changes(self) -> Iterator[ClusterState]:
        """The cluster now, and again after each change and every 10 s without one; ends when the node does."""
        state: ClusterState | None = None
        with self._explained():
            for name, data in self._stream("GET", "/cluster/stream", None):
                if data and state and name != "state":
                    state = applied(state, msgspec.json.decode(data, type=ClusterChange))
                elif data:
                    state = msgspec.json.decode(data, type=ClusterState)
                if state:
                    yield state

    def events(self, limit: int) -> list[dict[str, Any]]:
        """What happened lately, oldest first, at most `limit`."""
        return list(self._ask("GET", "/events", _Happened, params={"limit": EVENTS_MAX})["events"])[-limit:]

    def keys(self) -> list[dict[str, Any]]:
        """The valid API keys: `key_id`, `name`, `created_s`."""
        return list(self._ask("GET", "/keys", _Keys)["keys"])

    def add_key(self, name: str) -> dict[str, Any]:
        """A new API key, with `key`, which is never shown again."""
        return dict(self._ask("POST", "/keys", _MadeKey, json={"name": name}))

    def revoke_key(self, name_or_id: str) -> str:
        """The id of the key that is not valid any more."""
        return str(self._ask("DELETE", f"/keys/{quote(name_or_id, safe='')}", _RevokedKey)["key_id"])

    def models(self) -> list[dict[str, Any]]:
        """The listed models, in OpenAI's shape."""
        return list(self._ask("GET", "/v1/models", _Models)["data"])

    def expect_known(self, model: str, node_id: NodeId) -> None:
        """Raises `CliError` where the name leads to no model that could be placed. A preview on one node tells so."""
        self._ask("GET", "/instance/previews", _Previews, params={"model_id": model, "node_ids": node_id})

    def place(self, model: str, **options: Any) -> dict[str, Any]:
        """Asks for an instance; the answer has `instance_id`, `model_card` and `on_one_node_only`."""
        return dict(self._ask("POST", "/place_instance", _Placed, json={"model_id": model, **options}))

    def delete(self, instance_id: str) -> dict[str, Any]:
        """The answer has `on_one_node_only`."""
        return dict(self._ask("DELETE", f"/instance/{instance_id}", _Placed))

    def rebalance(self, instance_id: str) -> dict[str, Any]:
        """The answer has the `instance_id` that it has then, and `on_one_node_only`."""
        return dict(self._ask("POST", f"/instance/{instance_id}/rebalance", _Placed))

    def rotate_code(self, proof: str, without: list[NodeId]) -> RotationOutcome:
        """Asks for a new join code, which the nodes tell one another."""
        with self._explained():
            body = {"proof": proof, "without": without}
            answer = self._checked(self._http.post("/join_code/rotate", json=body))
            return msgspec.json.decode(answer.content, type=RotationOutcome)

    def generate(self, body: dict[str, Any]) -> Iterator[GenerationEvent]:
        """The answer, event by event. Closing the iterator cancels it."""
        with self._explained():
            for _, data in self._stream("POST", "/generate", body):
                if data:
                    yield msgspec.json.decode(data, type=GenerationEvent)

    def _ask(self, method: str, path: str, shape: type[Struct], **options: Any) -> Any:
        """The answer as it came, which has at least the fields of `shape`. Raises `CliError`."""
        with self._explained():
            answer = msgspec.json.decode(self._checked(self._http.request(method, path, **options)).content)
            msgspec.convert(answer, shape)
            return answer

    def _stream(self, method: str, path: str, body: dict[str, Any] | None) -> Iterator[tuple[str, bytes]]:
        """Name and data of each server-sent event; a comment, which says that the node lives, has neither."""
        timeout = httpx2.Timeout(ANSWER_SECONDS_MAX, connect=CONNECT_SECONDS_MAX, read=SILENCE_SECONDS_MAX)
        with self._explained(), self._http.stream(method, path, json=body, timeout=timeout) as response:
            if response.is_error:
                response.read()
            self._checked(response)
            name = ""
            for line in response.iter_lines():
                if line.startswith("event:"):
                    name = line.removeprefix("event:").strip()
                elif line.startswith("data:") and line != "data: [DONE]":
                    yield name, line.removeprefix("data:").strip().encode()
                elif line.startswith(":"):
                    yield "", b""

    @contextmanager
    def _explained(self) -> Generator[None]:
        try:
            yield
        except httpx2.ConnectError as error:
            sentence = f"No node answers at {self.url}. Start one with `covey up`, or name another with --url."
            raise NodeAwayError(sentence) from error
        except httpx2.HTTPError as error:
            raise CliError(f"The node at {self.url} broke off: {error or type(error).__name__}.") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._stranger(str(error)) from error

    def _checked(self, response: httpx2.Response) -> httpx2.Response:
        """The answer, if it is one. Raises `CliError` with the node's own sentence."""
        if response.is_success:
            return response
        try:
            message = msgspec.json.decode(response.content, type=_Failed).error.message
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise self._stranger(f"status {response.status_code}") from None
        raise refused(message, response.status_code)

    def _stranger(self, sign: str) -> CliError:
        """`sign`: by what it is known for one."""
        return CliError(
            f"No Covey node of this version answers at {self.url}, but something else does ({sign.rstrip('.')}). Start"
            " one with `covey up`, or name another with --url."
        )


def refused(message: str, status: int) -> CliError:
    """A node's own sentence, and the HTTP status that goes with it."""
    return WrongRequestError(message) if status == HTTPStatus.BAD_REQUEST else CliError(message)


def address(written: str) -> str:
    """The URL of a node, also where it is written as HOST, as HOST:PORT, or as OpenAI's clients are given it.

    Raises `CliError`.
    """
    url, has_scheme = written.strip().rstrip("/").removesuffix("/v1"), "://" in written
    if url.count(":") > 1 and not has_scheme and "]" not in url:
        url = f"[{url}]"  # an IPv6 address without brackets is all host
    try:
        parsed = httpx2.URL(url if has_scheme else f"http://{url}")
    except httpx2.InvalidURL:
        raise _no_address(written) from None
    port = parsed.port or (None if has_scheme else DEFAULT_PORT)
    if parsed.scheme not in SCHEMES or not parsed.host or "%" in parsed.host or not 0 < (port or 1) <= PORT_MAX:
        raise _no_address(written)
    return str(parsed.copy_with(port=port)).rstrip("/")


def _no_address(written: str) -> CliError:
    return CliError(f"'{written}' is not the address of a node: write it as HOST:PORT or http://HOST:PORT.")


def credentials() -> dict[str, str]:
    """From the environment only: other users of the machine can read a command line."""
    key = os.environ.get("COVEY_API_KEY", "").strip()
    if not key.isascii() or not key.isprintable():
        raise CliError("COVEY_API_KEY is not an API key: it holds characters that none has.")
    return {"Authorization": f"Bearer {key}"} if key else {}
