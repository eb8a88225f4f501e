"""What every route has in common: one envelope for errors, a limit for bodies, no traceback for anybody."""

import pytest
from fastapi.testclient import TestClient

from covey.api.body import BODY_BYTES_MAX
from tests.api.fake_backend import FakeBackend


def test_health(client: TestClient, backend: FakeBackend) -> None:
    assert client.get("/health").json()["status"] == "ok"
    assert client.get("/node_id").json() == backend.node_id


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/v1/chat/completions", 405), ("PUT", "/state", 405)],
)
def test_routes_that_are_none(client: TestClient, method: str, path: str, status: int) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "status"}
    assert error["status"] == status
    assert path in error["message"]


def test_malformed_json(client: TestClient) -> None:
    answer = client.post("/v1/chat/completions", content=b'{"model": ')
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("The body is not valid JSON: ")


@pytest.mark.parametrize("body", [b"", b" \n"])
def test_an_empty_body(client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/chat/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "The body is empty; it must be a JSON object."


def test_a_body_over_the_limit_is_refused_declared_or_not(client: TestClient) -> None:
    declared = client.post("/v1/chat/completions", content=b" " * (BODY_BYTES_MAX + 1))
    chunked = client.post("/v1/chat/completions", content=iter([b" " * 1024 * 1024] * 9))
    for answer in (declared, chunked):
        assert answer.status_code == 413
        assert answer.json()["error"]["status"] == 413


@pytest.mark.parametrize("stream", [True, False])
def test_our_own_mistake_is_told_without_a_traceback(
    client: TestClient, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch, *, stream: bool
) -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(backend, "generate", broken)
    body = {"model": "Tiny-Chat", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "Something went wrong on this node; its log says what."
    assert "secret" not in answer.text
