"""Keys are added, listed and revoked by whoever sits at the machine, and by nobody else."""

import time
from typing import Any

import pytest
from fastapi.testclient import TestClient

from covey.api import auth
from covey.api.guard import Access
from covey.api.server import create_guarded_app
from covey.schema.cluster import Accepted, AddKey, Refused, RevokeKey, TimedOut
from tests.api.fake_backend import FakeBackend

LAPTOP, SHOWN = auth.made("laptop", bytes(range(auth.ENTROPY_BYTES)), 1_700_000_000)
PHONE, _ = auth.made("phone", bytes(range(1, auth.ENTROPY_BYTES + 1)), 1_700_000_001)


@pytest.fixture
def here(backend: FakeBackend) -> TestClient:
    return TestClient(create_guarded_app(backend, Access()), base_url="http://localhost", client=("127.0.0.1", 1))


@pytest.fixture
def elsewhere(backend: FakeBackend) -> TestClient:
    backend.valid_keys.append(LAPTOP)
    app = create_guarded_app(backend, Access())
    return TestClient(app, base_url="http://localhost", client=("192.0.2.7", 1), headers={"x-api-key": SHOWN})


def test_a_key_is_shown_once_and_kept_as_a_hash(here: TestClient, backend: FakeBackend) -> None:
    backend.outcome = Accepted("id")
    answer = here.post("/keys", json={"name": "laptop"})
    assert (answer.status_code, answer.headers["cache-control"]) == (201, "no-store")
    made = answer.json()
    (command,) = backend.commands
    assert isinstance(command, AddKey)
    assert auth.known(made["key"], [command.key]) == command.key
    assert made["key"].rpartition("_")[2] not in repr(command)
    assert abs(made["created_s"] - time.time()) < 60
    again = here.post("/keys", json={"name": "laptop"}).json()
    assert again["key"] != made["key"]


def test_the_list_shows_no_hash(here: TestClient, backend: FakeBackend) -> None:
    backend.valid_keys += [PHONE, LAPTOP]
    assert here.get("/keys").json() == {
        "keys": [
            {"key_id": LAPTOP.key_id, "name": "laptop", "created_s": 1_700_000_000},
            {"key_id": PHONE.key_id, "name": "phone", "created_s": 1_700_000_001},
        ]
    }


def test_revoking_by_name(here: TestClient, backend: FakeBackend) -> None:
    backend.outcome = Accepted(LAPTOP.key_id)
    assert here.delete("/keys/my%20laptop").json() == {"key_id": LAPTOP.key_id}
    assert backend.commands == [RevokeKey("my laptop")]


def test_a_key_lets_nobody_else_in(elsewhere: TestClient, backend: FakeBackend) -> None:
    calls = [("GET", "/keys"), ("POST", "/keys"), ("DELETE", "/keys/laptop")]
    for method, path in calls:
        answer = elsewhere.request(method, path, json={"name": "x"} if method == "POST" else None)
        assert (answer.status_code, "`covey keys`" in answer.json()["error"]["message"]) == (403, True)
    assert backend.commands == []


@pytest.mark.parametrize(
    "body",
    [{}, {"name": ""}, {"name": None}, {"name": " x"}, {"name": "x" * 65}, {"name": "a\nb"}, {"name": "x\n"},
     {"name": 7}, {"name": "é"}, {"name": "x", "key": "mine"}, [], "x"],
)  # fmt: skip
def test_a_name_that_is_none(here: TestClient, backend: FakeBackend, body: Any) -> None:
    assert here.post("/keys", json=body).status_code == 400
    assert backend.commands == []


COMMANDS = [
    ("POST", "/place_instance", {"model_id": "Tiny-Chat"}),
    ("DELETE", "/instance/inst-1", None),
    ("POST", "/instance/inst-1/rebalance", None),
    ("POST", "/keys", {"name": "laptop"}),
    ("DELETE", "/keys/laptop", None),
]


@pytest.mark.parametrize(("method", "path", "body"), COMMANDS)
def test_every_command_answers(here: TestClient, backend: FakeBackend, method: str, path: str, body: Any) -> None:
    """Accepted with the id of its effect, refused with the leader's reason, or timed out; never in silence."""
    backend.outcome = Accepted("the-effect")
    answer = here.request(method, path, json=body)
    assert answer.is_success
    assert path == "/keys" or "the-effect" in answer.json().values()
    backend.outcome = Refused("The leader says no.", 409)
    answer = here.request(method, path, json=body)
    assert (answer.status_code, answer.json()["error"]["message"]) == (409, "The leader says no.")
    backend.outcome = TimedOut(10_000)
    answer = here.request(method, path, json=body)
    assert (answer.status_code, answer.headers["retry-after"]) == (504, "5")
    assert "it is not known whether the command was carried out" in answer.json()["error"]["message"]


def test_no_other_route_commands_anything(here: TestClient) -> None:
    paths = here.get("/openapi.json").json()["paths"]
    writing = {(method.upper(), path) for path, methods in paths.items() for method in methods if method != "get"}
    told = {
        ("POST", "/place_instance"),
        ("DELETE", "/instance/{instance_id}"),
        ("POST", "/instance/{instance_id}/rebalance"),
        ("POST", "/keys"),
        ("DELETE", "/keys/{key}"),
        ("POST", "/join_code/rotate"),  # in the logs of all nodes: each begins a new life, and a new list of events
    }
    assert writing - told == {("POST", "/v1/chat/completions"), ("POST", "/generate")}
