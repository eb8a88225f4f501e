"""A local server that speaks a hub's protocol, well or badly."""

import hashlib
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c0ffee" + "0" * 34


class Hub:
    """Serves `files` ("OWNER/REPO/FILE" -> content). What it should do wrong is set by the tests."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str]] = []  # method, path, range
        self.cut_after: list[int] = []  # of the next answers: bytes until the connection breaks
        self.sends_only: int | None = None  # bytes; and says that this is all
        self.hangs_after: int | None = None  # bytes of a body; then nothing comes, and nothing ends
        self.is_over = threading.Event()
        self.statuses: list[int] = []  # of the next answers, instead of what was asked for
        self.etag: str | None = None
        self.ignores_ranges = False
        self.authorization: list[str | None] = []
        self.url = ""

    def gets(self) -> list[str]:
        return [wanted for method, _, wanted in self.requests if method == "GET"]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.server.hub
        hub.requests.append((self.command, self.path, self.headers.get("Range", "")))
        hub.authorization.append(self.headers.get("Authorization"))
        if hub.statuses:
            self._refuse(hub.statuses.pop(0), None)
            return
        owner, repo, _, revision, *file = self.path.lstrip("/").split("/")
        name = f"{owner}/{repo}/{'/'.join(file)}"
        if not any(known.startswith(f"{owner}/{repo}/") for known in hub.files):
            self._refuse(401, "RepoNotFound")
        elif revision not in {"main", COMMIT}:
            self._refuse(404, "RevisionNotFound")
        elif name not in hub.files:
            self._refuse(404, "EntryNotFound")
        else:
            self._send(hub, hub.files[name])

    def _refuse(self, status: int, code: str | None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if status == 429:
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, hub: Hub, content: bytes) -> None:
        wanted = self.headers.get("Range")
        first, last = 0, len(content) - 1
        if wanted and not hub.ignores_ranges:
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            last = min(last, len(content) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        else:
            self.send_response(200)
        if self.command == "GET" and hub.sends_only is not None:
            last = first + hub.sends_only - 1
        etag = hub.etag or hashlib.sha256(content).hexdigest()
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Linked-Etag", f'"{etag}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        if self.command == "GET":
            self._send_body(hub, content[first : last + 1])

    def _send_body(self, hub: Hub, body: bytes) -> None:
        if hub.cut_after:
            self.wfile.write(body[: hub.cut_after.pop(0)])
            self.close_connection = True
        elif hub.hangs_after is not None and len(body) > hub.hangs_after:
            self.wfile.write(body[: hub.hangs_after])
            hub.is_over.wait()
            self.close_connection = True
        else:
            self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news; anything else is told."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serving() -> Generator[Hub]:
    hub = Hub()
    server = _Server(("127.0.0.1", 0), _Handler)
    server.hub = hub
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.is_over.set()
        server.shutdown()
        server.server_close()
        thread.join()
