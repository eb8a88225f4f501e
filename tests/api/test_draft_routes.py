"""A draft over HTTP: named as a model is, with the same errors, and shown where exo's clients don't look for it."""

import msgspec
import pytest
from fastapi.testclient import TestClient

from covey.api.server import create_app
from covey.schema.cluster import ClusterState, DownloadReport, DownloadState, PlaceModel, Refused
from covey.schema.runner import RunnerState
from tests.api.fake_backend import CARD, DRAFT, FIRST, SECOND, FakeBackend, cluster, member

READY = RunnerState.READY


def drafted() -> ClusterState:
    state = cluster(READY, READY)
    return msgspec.structs.replace(state, instances=(msgspec.structs.replace(state.instances[0], draft=DRAFT),))


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend(current=drafted())


@pytest.fixture
def client(backend: FakeBackend) -> TestClient:
    return TestClient(create_app(backend))


def test_a_draft_is_named_as_a_model_is(client: TestClient, backend: FakeBackend) -> None:
    answer = client.post("/place_instance", json={"model_id": "Tiny-Chat", "draft_model": "Tiny-Draft"})
    assert (answer.status_code, answer.json()["model_card"]["modelId"]) == (200, "Tiny-Chat")
    client.post("/place_instance", json={"model_id": "Tiny-Chat", "draft_model": None})
    assert backend.commands == [PlaceModel(card=CARD, draft=DRAFT), PlaceModel(card=CARD)]


def test_a_draft_that_is_not_known_is_told_as_a_model_that_is_not(client: TestClient, backend: FakeBackend) -> None:
    answers = [
        client.post("/place_instance", json={"model_id": "GPT-9"}),
        client.post("/place_instance", json={"model_id": "Tiny-Chat", "draft_model": "GPT-9"}),
        client.get("/instance/placement", params={"model_id": "Tiny-Chat", "draft_model": "GPT-9"}),
    ]
    assert {answer.status_code for answer in answers} == {404}
    assert len({answer.text for answer in answers}) == 1
    assert backend.commands == []


def test_what_can_not_guess_is_refused_with_the_leaders_reason(client: TestClient, backend: FakeBackend) -> None:
    backend.outcome = Refused("Tiny-Chat can't be its own draft", 400)
    answer = client.post("/place_instance", json={"model_id": "Tiny-Chat", "draft_model": "Tiny-Chat"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "Tiny-Chat can't be its own draft.")
    itself = client.get("/instance/placement", params={"model_id": "Tiny-Chat", "draft_model": "Tiny-Chat"})
    assert (itself.status_code, "can't be its own draft" in itself.text) == (400, True)


def test_what_a_placement_with_a_draft_would_be_is_told(client: TestClient) -> None:
    shown = client.get("/instance/placement", params={"model_id": "Tiny-Chat", "draft_model": "Tiny-Draft"})
    assert shown.json()["MlxRingInstance"]["draftModel"] == "Tiny-Draft"


def test_an_instance_shows_its_draft_and_one_without_has_no_such_field(
    client: TestClient, backend: FakeBackend
) -> None:
    assert client.get("/instance/inst-1").json()["MlxRingInstance"]["draftModel"] == "Tiny-Draft"
    assert client.get("/state/instances/inst-1/MlxRingInstance/draftModel").json() == "Tiny-Draft"
    assert client.get("/cluster").json()["instances"][0]["draft"]["model_id"] == "Tiny-Draft"
    backend.current = cluster(READY, READY)
    assert "draftModel" not in client.get("/instance/inst-1").json()["MlxRingInstance"]


def test_the_download_of_a_draft_is_shown_as_that_of_a_whole_model(client: TestClient, backend: FakeBackend) -> None:
    going = DownloadReport(
        model_id=DRAFT.model_id, state=DownloadState.ONGOING, bytes_done=100_000, bytes_total=400_000
    )
    members = (member(FIRST, "anna", (), downloads=(going,), models_on_disk=()), member(SECOND, "berta", ()))
    backend.current = msgspec.structs.replace(drafted(), members=members)
    shown = client.get(f"/state/downloads/{FIRST}/0/DownloadOngoing").json()
    assert shown["shardMetadata"]["PipelineShardMetadata"]["modelCard"]["modelId"] == "Tiny-Draft"
    assert shown["shardMetadata"]["PipelineShardMetadata"]["endLayer"] == 2
    assert shown["downloadProgress"]["downloaded"] == {"inBytes": 100_000}
