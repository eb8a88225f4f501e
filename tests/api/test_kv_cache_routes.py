"""The type of the KV cache over HTTP: asked for, refused where there is none such, shown where it is not the usual."""

import msgspec
import pytest
from fastapi.testclient import TestClient

from covey.api.server import create_app
from covey.schema.cluster import PlaceModel
from covey.schema.model import KvCacheType
from covey.schema.runner import RunnerState
from tests.api.fake_backend import CARD, FakeBackend, cluster

READY = RunnerState.READY


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend(current=cluster(READY, READY))


@pytest.fixture
def client(backend: FakeBackend) -> TestClient:
    return TestClient(create_app(backend))


def test_it_is_asked_for_by_name(client: TestClient, backend: FakeBackend) -> None:
    for body in ({"kv_cache": "f16"}, {"kv_cache": "f32"}, {}):
        assert client.post("/place_instance", json={"model_id": "Tiny-Chat", **body}).status_code == 200
    usual = PlaceModel(card=CARD)
    assert backend.commands == [PlaceModel(card=CARD, kv_cache=KvCacheType.F16), usual, usual]


def test_another_type_is_refused_and_those_there_are_are_named(client: TestClient, backend: FakeBackend) -> None:
    answers = [
        client.post("/place_instance", json={"model_id": "Tiny-Chat", "kv_cache": "q8"}),
        client.get("/instance/placement", params={"model_id": "Tiny-Chat", "kv_cache": "q8"}),
    ]
    for answer in answers:
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "kv_cache")
        assert "'f32' or 'f16'" in error["message"]
    assert backend.commands == []


def test_a_placement_with_it_takes_less_and_shows_it(client: TestClient) -> None:
    shown = client.get("/instance/placement", params={"model_id": "Tiny-Chat", "kv_cache": "f16"}).json()
    assert shown["MlxRingInstance"]["kvCache"] == "f16"
    usual = client.get("/instance/placement", params={"model_id": "Tiny-Chat"}).json()
    assert "kvCache" not in usual["MlxRingInstance"]


def test_an_instance_shows_it_and_the_usual_one_has_no_such_field(client: TestClient, backend: FakeBackend) -> None:
    assert "kvCache" not in client.get("/instance/inst-1").json()["MlxRingInstance"]
    assert client.get("/cluster").json()["instances"][0]["kv_cache"] == "f32"
    halved = msgspec.structs.replace(backend.current.instances[0], kv_cache=KvCacheType.F16)
    backend.current = msgspec.structs.replace(backend.current, instances=(halved,))
    assert client.get("/instance/inst-1").json()["MlxRingInstance"]["kvCache"] == "f16"
    assert client.get("/cluster").json()["instances"][0]["kv_cache"] == "f16"
