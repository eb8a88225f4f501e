"""A page that shows what happened asks again and again for what is new."""

import re

import pytest
from fastapi.testclient import TestClient

from covey.control.activity import Activity
from covey.schema.cluster import Refused, RevokeKey
from tests.api.fake_backend import FakeBackend


def happen(backend: FakeBackend, count: int) -> None:
    for number in range(count):
        backend.happened.hear(1_700_000_000_000, RevokeKey(f"key {number}"), Refused("no."))


def test_page_by_page(client: TestClient, backend: FakeBackend) -> None:
    happen(backend, 5)
    first = client.get("/events?limit=2")
    assert first.headers["cache-control"] == "no-store"
    page = first.json()
    assert (len(page["events"]), page["missed"]) == (2, False)
    event = page["events"][0]
    assert re.fullmatch(r"[0-9a-f]{8}-1", event.pop("id"))
    assert event == {
        "at": "2023-11-14T22:13:20.000000Z",
        "kind": "command_refused",
        "subject": "key 0",
        "text": "Revoking the API key 'key 0' was refused: no.",
    }
    rest = client.get(f"/events?after={page['cursor']}").json()
    assert [each["subject"] for each in rest["events"]] == ["key 2", "key 3", "key 4"]
    end = client.get(f"/events?after={rest['cursor']}").json()
    assert end == {"events": [], "cursor": rest["cursor"], "missed": False}


def test_before_anything_happened(client: TestClient, backend: FakeBackend) -> None:
    page = client.get("/events").json()
    assert page["events"] == []
    happen(backend, 1)
    assert len(client.get(f"/events?after={page['cursor']}").json()["events"]) == 1


def test_whoever_stayed_away_for_too_long_is_told(client: TestClient, backend: FakeBackend) -> None:
    backend.happened = Activity(events_max=3)
    happen(backend, 1)
    cursor = client.get("/events").json()["cursor"]
    happen(backend, 3)
    assert client.get(f"/events?after={cursor}").json()["missed"] is False
    happen(backend, 1)
    late = client.get(f"/events?after={cursor}").json()
    assert (late["missed"], len(late["events"])) == (True, 3)


def test_the_cursor_of_another_life_starts_anew(client: TestClient, backend: FakeBackend) -> None:
    happen(backend, 2)
    page = client.get("/events?after=01234567-1").json()
    assert (page["missed"], len(page["events"])) == (True, 2)


@pytest.mark.parametrize("limit", ["0", "-1", "1001", "x", "1.5", "٣", "9" * 5000])
def test_a_limit_that_is_none(client: TestClient, limit: str) -> None:
    answer = client.get("/events", params={"limit": limit})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "limit")


@pytest.mark.parametrize("cursor", ["x", "7", "life-", "life-x", "life-٣", "life-" + "9" * 4000])
def test_a_cursor_that_is_none(client: TestClient, cursor: str) -> None:
    answer = client.get("/events", params={"after": cursor})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "after")
