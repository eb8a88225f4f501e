"""Who gets in: people at the machine, holders of a key elsewhere, and no web page that happens to be open."""

import logging
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from covey.api import auth
from covey.api.errors import RequestError
from covey.api.guard import HEADERS_BYTES_MAX, TARGET_BYTES_MAX, Access, is_local, name_of, refuse_foreign_host
from covey.api.server import create_guarded_app
from tests.api.fake_backend import FakeBackend

HERE, ELSEWHERE = ("127.0.0.1", 50_000), ("192.0.2.7", 50_000)
ACCESS = Access(host_names=frozenset({"anna", "anna.local"}), origins=frozenset({"https://chat.example"}))
KEY, SHOWN = auth.made("laptop", bytes(range(auth.ENTROPY_BYTES)), 0)


def visit(
    backend: FakeBackend, access: Access = ACCESS, client: tuple[str, int] = HERE, host: str = "127.0.0.1:52415"
) -> TestClient:
    return TestClient(create_guarded_app(backend, access), base_url=f"http://{host}", client=client)


@pytest.fixture
def owner(backend: FakeBackend) -> FakeBackend:
    backend.valid_keys.append(KEY)
    return backend


def message(answer: Any) -> str:
    error = answer.json()["error"]
    assert error["status"] == answer.status_code
    return str(error["message"])


# ---- keys ----


def test_at_the_machine_no_key_is_asked(backend: FakeBackend) -> None:
    for client in (HERE, ("::1", 5), ("::ffff:127.0.0.1", 5), ("127.9.9.9", 5)):
        assert visit(backend, client=client).get("/node_id").status_code == 200


def test_from_elsewhere_a_key_is_asked_before_anything_else(owner: FakeBackend) -> None:
    elsewhere = visit(owner, client=ELSEWHERE)
    for method, path in [("GET", "/state"), ("GET", "/nowhere"), ("POST", "/place_instance"), ("GET", "/health")]:
        answer = elsewhere.request(method, path)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert "`covey keys add NAME`" in message(answer)
    for headers in ({"Authorization": f"Bearer {SHOWN}"}, {"authorization": f"bearer  {SHOWN}"}, {"x-api-key": SHOWN}):
        assert elsewhere.get("/node_id", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "shown",
    ["", "x", SHOWN[:-1], SHOWN + "0", SHOWN.upper(), SHOWN[:-1] + "0", SHOWN.replace("_", "-"), "covey__", SHOWN * 50],
)
def test_a_wrong_key_is_refused(owner: FakeBackend, shown: str) -> None:
    elsewhere = visit(owner, client=ELSEWHERE)
    for headers in ({"Authorization": f"Bearer {shown}"}, {"x-api-key": shown}, {"Authorization": f"Basic {shown}"}):
        assert elsewhere.get("/node_id", headers=headers).status_code == 401


def test_a_revoked_key_is_refused_at_once(owner: FakeBackend) -> None:
    elsewhere = visit(owner, client=ELSEWHERE)
    headers = {"x-api-key": SHOWN}
    assert elsewhere.get("/node_id", headers=headers).status_code == 200
    owner.valid_keys.clear()
    answer = elsewhere.get("/node_id", headers=headers)
    assert (answer.status_code, "was revoked" in message(answer)) == (401, True)


def test_what_a_proxy_passes_on_is_not_from_here(backend: FakeBackend) -> None:
    for header in ("X-Forwarded-For", "Forwarded", "X-Real-IP", "Via"):
        assert visit(backend).get("/node_id", headers={header: "127.0.0.1"}).status_code == 401


def test_a_machine_that_calls_its_own_address_is_here() -> None:
    def local(client: tuple[str, int] | None, server: tuple[str, int] | None) -> bool:
        return is_local({"client": client, "server": server}, {})

    assert local(("192.0.2.7", 1), ("192.0.2.7", 2))
    assert local(("fe80::1%eth0", 1), ("fe80::1%eth0", 2))
    assert not local(("192.0.2.7", 1), ("192.0.2.8", 2))
    assert not local(None, ("192.0.2.8", 2))
    assert not local(("unix", 1), ("192.0.2.8", 2))


def test_two_ways_to_say_it_otherwise(owner: FakeBackend) -> None:
    assert visit(owner, Access(is_open=True), ELSEWHERE).get("/node_id").status_code == 200
    strict = visit(owner, Access(asks_everybody=True))
    assert strict.get("/node_id").status_code == 401
    assert strict.get("/node_id", headers={"x-api-key": SHOWN}).status_code == 200


@given(st.text(max_size=80) | st.just(SHOWN), st.binary(min_size=auth.ENTROPY_BYTES, max_size=auth.ENTROPY_BYTES))
def test_only_the_key_itself_is_known(text: str, entropy: bytes) -> None:
    key, shown = auth.made("any", entropy, 0)
    assert auth.known(shown, [key]) == key
    assert (auth.known(text, [key]) is None) == (text != shown)
    assert auth.known(shown, []) is None
    assert shown.rpartition("_")[2] not in repr(key)


def test_who_asks_is_told_by_an_id(owner: FakeBackend) -> None:
    """Requests of one key count together wherever they come from; a wrong key at the machine is nobody's."""
    body = {"model": "Tiny-Chat", "messages": [{"role": "user", "content": "hi"}]}
    wrong = SHOWN[:-1] + ("0" if SHOWN[-1] != "0" else "1")
    for client, headers in [(ELSEWHERE, {"x-api-key": SHOWN}), (HERE, {"Authorization": f"Bearer {SHOWN}"}),
                            (HERE, {}), (HERE, {"x-api-key": wrong}), (HERE, {"x-api-key": "sk-any"})]:  # fmt: skip
        for path in ("/generate", "/v1/chat/completions"):
            assert visit(owner, client=client).post(path, json=body, headers=headers).is_success
    assert [each.account for each in owner.requests] == [KEY.key_id] * 4 + [""] * 6


# ---- names ----


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:52415", "a.localhost", "127.0.0.1", "[::1]:9", "192.0.2.9:1", "anna", "Anna.local."],
)
def test_names_and_addresses_of_this_node(backend: FakeBackend, host: str) -> None:
    assert visit(backend).get("/node_id", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "anna.evil.example", "localhost.evil.example", "127.0.0.1.nip.example", "", "[", "a:b:c",
     "localhost:port", "x@localhost", "localhost/x", "localhost:99999", "2130706433", "xn--", " "],
)  # fmt: skip
def test_a_foreign_name_is_refused_even_with_a_key(owner: FakeBackend, host: str) -> None:
    answer = visit(owner).get("/state", headers={"Host": host, "x-api-key": SHOWN})
    assert answer.status_code == 421
    assert "`covey up" in message(answer)


def test_the_refusal_says_how_to_allow_the_name(owner: FakeBackend) -> None:
    answer = visit(owner).get("/state", headers={"Host": "box.example:80"})
    assert "`covey up --allow-host box.example`" in message(answer)
    assert (
        visit(owner, Access(host_names=frozenset({"box.example"})))
        .get("/node_id", headers={"Host": "box.example:80"})
        .is_success
    )


@given(st.text(max_size=60))
def test_whatever_is_sent_as_a_host_is_one_or_is_refused(host: str) -> None:
    if name_of(host) not in {"anna", "anna.local", "localhost"}:
        with pytest.raises(RequestError, match="does not name this node"):
            refuse_foreign_host(host, ACCESS)


# ---- pages ----


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:1", "file://", "chrome-extension://x", "", "x"]
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/state"), ("POST", "/place_instance"), ("OPTIONS", "/keys")])
def test_foreign_pages_are_refused(owner: FakeBackend, origin: str, method: str, path: str) -> None:
    access = Access()  # no page is allowed: no CORS at all
    answer = visit(owner, access).request(method, path, headers={"Origin": origin})
    assert answer.status_code == 403
    assert "--allow-origin" in message(answer)
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert owner.commands == []


def test_pages_of_the_node_itself_and_those_allowed(owner: FakeBackend) -> None:
    own = visit(owner).get("/node_id", headers={"Origin": "http://127.0.0.1:52415"})
    assert own.is_success
    allowed = visit(owner).get("/node_id", headers={"Origin": "https://chat.example"})
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
    asked = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    preflight = visit(owner, client=ELSEWHERE).options("/v1/chat/completions", headers=asked)
    assert preflight.is_success
    refused = visit(owner, client=ELSEWHERE).get("/node_id", headers={"Origin": "https://chat.example"})
    assert refused.status_code == 401
    assert (
        visit(owner).options("/v1/chat/completions", headers={**asked, "Origin": "https://b.example"}).status_code
        == 400
    )


# ---- sizes ----


def test_headers_and_addresses_have_limits(backend: FakeBackend) -> None:
    client = visit(backend)
    assert client.get("/node_id", headers={"x": "y" * HEADERS_BYTES_MAX}).status_code == 431
    assert client.get("/node_id", headers={f"x{n}": "y" * 20 for n in range(900)}).status_code == 431
    assert client.get("/state/" + "a/" * TARGET_BYTES_MAX).status_code == 414
    assert client.get("/node_id?" + "a" * 7000).status_code == 200


# ---- the log ----


def test_the_log_names_the_key_and_hides_what_was_asked(owner: FakeBackend, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "covey.access"):
        visit(owner, client=ELSEWHERE).get("/events?after=secret", headers={"x-api-key": SHOWN})
        visit(owner, client=ELSEWHERE).get("/keys\u2028x", headers={"x-api-key": "wrong"})
    known, stranger = [record.getMessage() for record in caplog.records if record.name == "covey.access"]
    assert known.startswith("192.0.2.7 laptop GET /events 400 ")
    assert stranger.startswith("192.0.2.7 - GET /keys\\u2028x 401 ")
    assert SHOWN not in caplog.text
    assert "secret" not in known


def test_a_request_without_host_is_no_browsers() -> None:
    refuse_foreign_host(None, ACCESS)
