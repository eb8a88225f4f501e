"""Who may speak to the API at all: it stands before every route, and reads no body. ASGI, framework unseen.

In this order: headers within a size; a Host that is ours, since the name of a foreign page may be made to point here
(DNS rebinding); no Origin of a foreign page; and a key from whoever is not on this machine. Host and Origin guard the
keyless door of this machine: its browser knocks there on behalf of any page.
"""

import ipaddress
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Final
from urllib.parse import urlsplit

import anyio
from msgspec import Struct
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from covey.api import auth
from covey.api.answers import error_response
from covey.api.errors import RequestError
from covey.schema.cluster import ApiKey

HEADERS_BYTES_MAX: Final = 16 * 1024  # request line and headers; the server reads no further than that either
TARGET_BYTES_MAX: Final = 8 * 1024
FORWARDED: Final = frozenset({"forwarded", "x-forwarded-for", "x-real-ip", "via"})
LOCAL: Final = "covey.is_local"  # in a request's scope: it comes from this machine
KEY_ID: Final = "covey.key_id"  # in a request's scope: of the key that it shows, needed or not
NOBODY: Final = "-"

_log = logging.getLogger("covey.access")


class Access(Struct, frozen=True, kw_only=True):
    """Who may come in. Names are in lower case, without a port."""

    host_names: frozenset[str] = frozenset()  # that a Host header may have, beside "localhost" and IP addresses
    origins: frozenset[str] = frozenset()  # of web pages that may use the API: "https://chat.example"
    is_open: bool = False  # no key is asked of anybody
    asks_everybody: bool = False  # a key is asked on this machine, too


class Guard:
    """`application` behind the checks. `keys` gives the valid keys."""

    def __init__(self, application: ASGIApp, access: Access, keys: Callable[[], Iterable[ApiKey]]) -> None:
        self._application = application
        self._access = access
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "the server speaks nothing else"
        visit = Visit(scope, send)
        try:
            key = self._admit(scope)
            visit.name, scope[KEY_ID] = (key.name, key.key_id) if key else (NOBODY, "")
        except RequestError as error:
            await error_response(error)(scope, receive, visit.send)
        else:
            await self._application(scope, receive, visit.send)
        finally:
            visit.log()

    def _admit(self, scope: Scope) -> ApiKey | None:
        """The key that the request shows, if it does; a wrong one matters only where one is needed.

        Raises `RequestError`.
        """
        refuse_large(scope)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refuse_foreign_host(headers.get("host"), self._access)
        refuse_foreign_origin(headers, self._access)
        scope[LOCAL] = is_local(scope, headers)
        is_free = self._access.is_open or (scope[LOCAL] and not self._access.asks_everybody)
        if is_free:
            return auth.known(auth.shown_key(headers) or "", self._keys())
        return auth.admitted(headers, self._keys())


def account_of(scope: Scope) -> str:
    """Who asks, as far as fairness goes: an id that tells other nodes nothing; empty without a key."""
    return str(scope.get(KEY_ID, ""))


class Visit:
    """One request, for the access log: who, what, and how it ended; never a query, a body or a key."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.name = NOBODY
        self._scope = scope
        self._send = send
        self._status = 0
        self._began = anyio.current_time()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
        await self._send(message)

    def log(self) -> None:
        client = self._scope.get("client") or (NOBODY, 0)
        took_ms = (anyio.current_time() - self._began) * 1000
        path = self._scope["path"].encode("unicode_escape").decode()
        line = (client[0], self.name, self._scope["method"], path, self._status, took_ms)
        _log.info("%s %s %s %s %d %.0f ms", *line)


# ---- sizes ----


def refuse_large(scope: Scope) -> None:
    """Raises `RequestError` 414 or 431."""
    target = len(scope["raw_path"] or b"") + len(scope["query_string"])
    if target > TARGET_BYTES_MAX:
        raise RequestError(f"The address is longer than the limit of {TARGET_BYTES_MAX} bytes.", status=414)
    if target + sum(len(name) + len(value) for name, value in scope["headers"]) > HEADERS_BYTES_MAX:
        raise RequestError(f"The headers are larger than the limit of {HEADERS_BYTES_MAX} bytes.", status=431)


# ---- names ----


def refuse_foreign_host(host: str | None, access: Access) -> None:
    """Raises `RequestError` 421. A name can be made to point anywhere; an address is what it is, so any may stand here.

    Only programs of the last century send no Host, and no browser is among them.
    """
    name = name_of(host) if host is not None else "localhost"
    if name is None or not (is_address(name) or name in access.host_names or is_loopback_name(name)):
        wanted = f" --allow-host {name}" if name else ""
        raise RequestError(
            f"The Host header {host!r} does not name this node. If it is a name of yours for it, start the node with"
            f" `covey up{wanted}`.",
            status=421,
        )


def refuse_foreign_origin(headers: Mapping[str, str], access: Access) -> None:
    """Raises `RequestError` 403. Pages that this node serves itself have its own Host as their origin."""
    origin = headers.get("origin")
    if origin is None or origin.lower() in access.origins or is_own(origin, headers.get("host", "")):
        return
    raise RequestError(
        f"Web pages of {origin!r} may not use this node. If you trust them, start the node with"
        f" `covey up --allow-origin {origin}`.",
        status=403,
    )


def is_own(origin: str, host: str) -> bool:
    """Whether a page of `origin` came from `host`, whatever port stands for the scheme."""
    scheme, separator, authority = origin.partition("://")
    return bool(separator) and scheme in {"http", "https"} and authority.lower() == host.lower()


def name_of(host: str) -> str | None:
    """The name or address in a Host header, without brackets, port and final dot; None for what is neither."""
    try:
        parts = urlsplit(f"//{host}")
        name, _ = parts.hostname, parts.port
    except ValueError:
        return None
    return name.removesuffix(".") if name and parts.netloc == host and "@" not in host else None


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback_name(name: str) -> bool:
    return name == "localhost" or name.endswith(".localhost")


# ---- places ----


def is_local(scope: Scope, headers: Mapping[str, str]) -> bool:
    """Whether the request comes from this machine: from a loopback address, or from the very address that it goes to.

    What a proxy on this machine passes on may come from anywhere.
    """
    if FORWARDED & set(headers):
        return False
    client, server = scope.get("client"), scope.get("server")
    if not client or not server:
        return False
    try:
        here = plain_address(client[0])
        return here.is_loopback or here == plain_address(server[0])
    except ValueError:
        return False


def plain_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Raises `ValueError`. IPv4 over an IPv6 socket is IPv4."""
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
