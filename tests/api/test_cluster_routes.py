"""A dashboard written for exo reads our cluster; a script places, waits for and deletes instances."""

import json

import msgspec
import pytest
from fastapi.testclient import TestClient
from msgspec.structs import replace

from covey.api import cluster_objects, cluster_state
from covey.api.case import camel, camel_case
from covey.api.errors import RequestError
from covey.schema.cluster import (
    ClusterState,
    DeleteInstance,
    DownloadReport,
    DownloadState,
    PlaceModel,
    Refused,
    TimedOut,
    Visibility,
)
from covey.schema.ids import InstanceId, NodeId
from covey.schema.model import Quantizing, Shard
from covey.schema.runner import RunnerState
from tests.api.fake_backend import CARD, FIRST, SECOND, FakeBackend, cluster, member, runner

READY = RunnerState.READY


# ---- state ----


def test_a_runner_whose_process_does_not_end_is_shutting_down_as_far_as_exo_knows() -> None:
    assert cluster_objects.runner(camel_case, runner(1, RunnerState.STUCK)) == {"RunnerShuttingDown": {}}


def test_an_unchanged_state_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/state")
    assert first.headers["cache-control"] == "no-store"
    second = client.get("/state", headers={"If-None-Match": first.headers["etag"]})
    assert (second.status_code, second.content) == (304, b"")
    assert second.headers["etag"] == first.headers["etag"]


@pytest.mark.parametrize("known", ["*", 'W/"x", {}', '"x",{}', "{}"])
def test_an_etag_is_known_however_it_is_written(client: TestClient, known: str) -> None:
    for path in ("/state", "/cluster", "/state/runners"):
        etag = client.get(path).headers["etag"]
        assert client.get(path, headers={"If-None-Match": known.format(etag)}).status_code == 304
        assert client.get(path, headers={"If-None-Match": etag[4:-1]}).status_code == 200


def test_time_alone_changes_no_state_but_a_runner_does(client: TestClient, backend: FakeBackend) -> None:
    """Nor does a report that says the same again, nor a revision that counts what no client sees."""
    etags = [client.get(path).headers["etag"] for path in ("/state", "/cluster")]
    older = tuple(
        msgspec.structs.replace(
            each, heard_ms_ago=900, report=each.report and msgspec.structs.replace(each.report, sequence=99)
        )
        for each in backend.current.members
    )
    backend.current = msgspec.structs.replace(backend.current, members=older, revision=99)
    assert [client.get(path).headers["etag"] for path in ("/state", "/cluster")] == etags
    backend.current = cluster(READY, RunnerState.RUNNING, revision=8)
    assert client.get("/state").headers["etag"] != etags[0]
    assert client.get("/cluster").headers["etag"] != etags[1]


def test_a_part_of_the_state(client: TestClient) -> None:
    assert client.get(f"/state/nodeMemory/{FIRST}/ramTotal/inBytes").json() == 8_000_000_000
    assert client.get("/state/topology/nodes/1").json() == SECOND
    assert client.get("/state/runners/run-1").json() == {"RunnerReady": {"prefillServerPort": None}}
    assert client.get("/state/topology/").json()["nodes"] == [FIRST, SECOND]


@pytest.mark.parametrize("path", ["nobody", "topology/nodes/2", "topology/nodes/x", "topology/nodes/" + "9" * 5000])
def test_a_part_that_is_not_there(path: str) -> None:
    with pytest.raises(RequestError, match="unable to find path") as caught:
        cluster_state.part_of({"topology": {"nodes": ["a", "b"]}}, path)
    assert caught.value.status == 404


def test_runner_states_have_the_names_that_clients_know(client: TestClient, backend: FakeBackend) -> None:
    backend.current = cluster(RunnerState.FAILED, RunnerState.WARMING_UP, reason="Out of memory.")
    runners = client.get("/state/runners").json()
    assert runners["run-1"] == {"RunnerFailed": {"errorMessage": "Out of memory.", "diagnostics": []}}
    assert runners["run-2"] == {"RunnerWarmingUp": {}}


def test_a_download_shows_how_far_it_is(client: TestClient, backend: FakeBackend) -> None:
    going = DownloadReport(
        model_id=CARD.model_id,
        state=DownloadState.ONGOING,
        bytes_done=1_000_000,
        bytes_total=5_000_000,
        bytes_per_second=2_000_000.0,
    )
    failed = msgspec.structs.replace(going, state=DownloadState.FAILED, reason="The disk is full.")
    first = member(FIRST, "anna", (), downloads=(going,), models_on_disk=())
    second = member(SECOND, "berta", (), downloads=(failed,), models_on_disk=())
    backend.current = msgspec.structs.replace(cluster(), members=(first, second))
    shown = client.get(f"/state/downloads/{FIRST}/0/DownloadOngoing").json()
    assert shown["downloadProgress"]["downloaded"] == {"inBytes": 1_000_000}
    assert shown["downloadProgress"]["etaMs"] == 2000
    assert shown["shardMetadata"]["PipelineShardMetadata"]["endLayer"] == 4
    assert client.get(f"/state/downloads/{SECOND}/0/DownloadFailed/errorMessage").json() == "The disk is full."


def test_a_node_that_has_not_reported_and_one_that_is_away(client: TestClient, backend: FakeBackend) -> None:
    first, second = cluster(READY, READY).members
    silent = msgspec.structs.replace(second, report=None)
    away = msgspec.structs.replace(second, visibility=Visibility.AWAY, heard_ms_ago=4000)
    for other in (silent, away):
        backend.current = msgspec.structs.replace(cluster(READY, READY), members=(first, other))
        state = client.get("/state").json()
        assert state["topology"] == {"nodes": [FIRST, SECOND], "connections": {}}
        assert state["nodeIdentities"][FIRST]["friendlyName"] == "anna"


def test_our_own_clients_get_the_snapshot_as_it_is(client: TestClient, backend: FakeBackend) -> None:
    assert msgspec.json.decode(client.get("/cluster").content, type=ClusterState) == backend.current


def test_camel_case() -> None:
    assert [camel(name) for name in ("n_layers", "model_id", "ip")] == ["nLayers", "modelId", "ip"]


# ---- place, await, delete ----


def test_placing_passes_everything_on_and_names_the_instance(client: TestClient, backend: FakeBackend) -> None:
    body = {"model_id": "Tiny-Chat", "min_nodes": 2, "context_length": 512, "slot_count": 3, "node_ids": [FIRST]}
    answer = client.post("/place_instance", json={**body, "sharding": "Pipeline", "instance_meta": "MlxRing"})
    assert answer.status_code == 200
    assert answer.json()["instance_id"] == "inst-1"
    assert answer.json()["message"] == "Command received."
    assert answer.json()["model_card"]["modelId"] == "Tiny-Chat"
    asked = PlaceModel(card=CARD, node_count_min=2, context_length=512, slot_count=3, node_ids=(NodeId(FIRST),))
    assert backend.commands == [asked]
    client.post("/place_instance", json={"model_id": "Tiny-Chat", "exact": True})
    client.post("/place_instance", json={"model_id": "Tiny-Chat", "quantize": "q4"})
    assert backend.commands[1:] == [
        PlaceModel(card=CARD, exact=True),
        PlaceModel(card=CARD, quantize=Quantizing.Q4),
    ]


@pytest.mark.parametrize(
    ("body", "rank_count", "node_count_min"),
    [
        ({"sharding": "Tensor", "min_nodes": 2}, 2, 2),  # as exo's clients say it
        ({"sharding": "Tensor"}, 1, 1),
        ({"sharding": "Pipeline", "min_nodes": 2}, 1, 2),
        ({"rank_count": 2}, 2, 1),
        ({"sharding": "Tensor", "rank_count": 2, "min_nodes": 4}, 2, 4),
    ],
)
def test_how_many_nodes_are_to_share_each_layer_is_passed_on(
    client: TestClient, backend: FakeBackend, body: dict[str, object], rank_count: int, node_count_min: int
) -> None:
    assert client.post("/place_instance", json={"model_id": "Tiny-Chat", **body}).status_code == 200
    assert backend.commands == [PlaceModel(card=CARD, rank_count=rank_count, node_count_min=node_count_min)]


def test_what_a_placement_would_be_is_told_without_placing(client: TestClient, backend: FakeBackend) -> None:
    query = {"model_id": "Tiny-Chat", "sharding": "Tensor", "instance_meta": "MlxRing", "min_nodes": "2"}
    shown = client.get("/instance/placement", params=query)
    assert shown.status_code == 200, shown.text
    shards = shown.json()["MlxRingInstance"]["shardAssignments"]
    assert {next(iter(each)) for each in shards["runnerToShard"].values()} == {"TensorShardMetadata"}
    assert set(shards["nodeToRunner"]) == {FIRST, SECOND}
    assert backend.commands == []


@pytest.mark.parametrize(
    ("query", "status", "words"),
    [
        ({}, 400, "'model_id' is missing"),
        ({"model_id": "GPT-9"}, 404, "There is no model"),
        ({"model_id": "Tiny-Chat", "min_nodes": "two"}, 400, "'min_nodes' must be a whole number"),
        ({"model_id": "Tiny-Chat", "min_nodes": "--3"}, 400, "'min_nodes' must be a whole number"),
        ({"model_id": "Tiny-Chat", "min_nodes": "0"}, 400, "'min_nodes'"),
        ({"model_id": "Tiny-Chat", "min_nodes": "9" * 5000}, 400, "'min_nodes'"),
        ({"model_id": "Tiny-Chat", "sharding": "Cfg"}, 400, "'sharding'"),
        ({"model_id": "Tiny-Chat", "instance_meta": "MlxJaccl"}, 400, "'instance_meta'"),
        ({"model_id": "Tiny-Chat", "min_nodes": "3"}, 400, "Asked for 3 nodes, only 2 are here"),
        ({"model_id": "Tiny-Chat", "sharding": "Tensor", "min_nodes": "4"}, 400, "only 2 are here"),
        ({"model_id": "Tiny-Chat", "rank_count": "4"}, 400, "4 ranks need 4 nodes"),
    ],
)
def test_a_placement_that_could_not_be_is_told_with_the_reason(
    client: TestClient, query: dict[str, str], status: int, words: str
) -> None:
    answer = client.get("/instance/placement", params=query)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_the_previews_have_a_row_for_each_way_and_number_of_nodes(client: TestClient) -> None:
    rows = client.get("/instance/previews", params={"model_id": "Tiny-Chat"}).json()["previews"]
    found = [(row["sharding"], row["instance_meta"], len(row["memory_delta_by_node"] or {})) for row in rows]
    assert found == [
        ("Pipeline", "MlxRing", 1),
        ("Pipeline", "MlxRing", 2),
        ("Pipeline", "MlxJaccl", 0),
        ("Tensor", "MlxRing", 1),
        ("Tensor", "MlxRing", 2),
        ("Tensor", "MlxJaccl", 0),
    ]
    assert all((row["instance"] is None) is (row["error"] is not None) for row in rows)


def test_previews_of_chosen_nodes_use_no_others(client: TestClient) -> None:
    rows = client.get("/instance/previews", params={"model_id": "Tiny-Chat", "node_ids": [SECOND]}).json()["previews"]
    assert {node for row in rows for node in row["memory_delta_by_node"] or {}} == {SECOND}


def test_without_nodes_there_are_no_previews(client: TestClient, backend: FakeBackend) -> None:
    backend.current = replace(backend.current, members=())
    assert client.get("/instance/previews", params={"model_id": "Tiny-Chat"}).json() == {"previews": []}
    assert client.get("/instance/previews").status_code == 400


def test_layers_that_are_shared_are_shown_as_exo_does(client: TestClient, backend: FakeBackend) -> None:
    before = backend.current.instances[0]
    whole = Shard(0, 4, 4)
    stages = tuple(replace(each, shard=whole, rank=rank) for rank, each in enumerate(before.stages))
    shared = replace(before, stages=stages, rank_count=2)
    backend.current = replace(backend.current, instances=(shared,))
    shards = client.get("/state").json()["instances"]["inst-1"]["MlxRingInstance"]["shardAssignments"]["runnerToShard"]
    found = [shards[stage.runner_id]["TensorShardMetadata"] for stage in stages]
    assert [(each["deviceRank"], each["worldSize"]) for each in found] == [(0, 2), (1, 2)]
    assert [(each["startLayer"], each["endLayer"]) for each in found] == [(0, 4), (0, 4)]
    assert found[0]["modelCard"]["supportsTensor"] is True


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "model_id"),
        ({"model_id": "Tiny-Chat", "min_nodes": 0}, "min_nodes"),
        ({"model_id": "Tiny-Chat", "min_nodes": 10**9}, "min_nodes"),
        ({"model_id": "Tiny-Chat", "exact": "very"}, "exact"),
        ({"model_id": "Tiny-Chat", "quantize": "q5"}, "quantize"),
        ({"model_id": "Tiny-Chat", "quantize": 4}, "quantize"),
        ({"model_id": "Tiny-Chat", "kv_cache": "q8"}, "kv_cache"),
        ({"model_id": "Tiny-Chat", "kv_cache": 16}, "kv_cache"),
        ({"model_id": "Tiny-Chat", "sharding": "Cfg"}, "sharding"),
        ({"model_id": "Tiny-Chat", "rank_count": 0}, "rank_count"),
        ({"model_id": "Tiny-Chat", "rank_count": -2}, "rank_count"),
        ({"model_id": "Tiny-Chat", "rank_count": 65}, "rank_count"),
        ({"model_id": "Tiny-Chat", "rank_count": "2"}, "rank_count"),
        ({"model_id": "Tiny-Chat", "draft_model": ""}, "draft_model"),
        ({"model_id": "Tiny-Chat", "draft_model": 7}, "draft_model"),
        ({"model_id": "Tiny-Chat", "instance_meta": "MlxJaccl"}, "instance_meta"),
        ({"model_id": "Tiny-Chat", "instanceMeta": "MlxRing"}, "instanceMeta"),
    ],
)
def test_a_wrong_field_of_a_placement_is_named(
    client: TestClient, backend: FakeBackend, body: dict[str, object], param: str
) -> None:
    answer = client.post("/place_instance", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert backend.commands == []


def test_the_leaders_refusal_reaches_whoever_asked(client: TestClient, backend: FakeBackend) -> None:
    backend.outcome = Refused("No node has 9 GB free.", 409)
    answer = client.post("/place_instance", json={"model_id": "Tiny-Chat"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (409, "No node has 9 GB free.")


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("there is no instance x: `covey ps` lists them.", "There is no instance x: `covey ps` lists them."),
        ("this node is shutting down; ask another", "This node is shutting down; ask another."),
        ("qwen2.5-0.5b-q4 needs 9 GB.", "qwen2.5-0.5b-q4 needs 9 GB."),
        ("/models/a.gguf needs 9 GB: is it right?", "/models/a.gguf needs 9 GB: is it right?"),
        ("hf:a/b/c.gguf has gone", "hf:a/b/c.gguf has gone."),
    ],
)
def test_a_reason_is_a_sentence_to_clients_and_leaves_names_alone(
    reason: str, message: str, client: TestClient, backend: FakeBackend
) -> None:
    backend.outcome = Refused(reason, 404)
    for answer in (client.delete("/instance/inst-1"), client.post("/place_instance", json={"model_id": "Tiny-Chat"})):
        assert (answer.status_code, answer.json()["error"]["message"]) == (404, message)


def test_no_leader_is_a_timeout_that_says_what_is_not_known(client: TestClient, backend: FakeBackend) -> None:
    backend.outcome = TimedOut(10_000)
    answer = client.delete("/instance/inst-1")
    assert answer.status_code == 504
    assert answer.headers["retry-after"] == "5"
    assert "No leader answered within 10 s" in answer.json()["error"]["message"]


def test_deleting_an_instance(client: TestClient, backend: FakeBackend) -> None:
    answer = client.delete("/instance/inst-1")
    assert answer.json()["instance_id"] == "inst-1"
    assert backend.commands == [DeleteInstance(InstanceId("inst-1"))]


def awaited(client: TestClient, parameters: str) -> dict[str, object]:
    answer = client.get(f"/instance/await?{parameters}")
    lines = [line for line in answer.text.splitlines() if line.startswith("data: ")]
    assert len(lines) == 1
    return json.loads(lines[0].removeprefix("data: "))


def test_ready_means_that_the_runners_are_ready(client: TestClient, backend: FakeBackend) -> None:
    event = awaited(client, "model_id=Tiny-Chat&timeout_seconds=0")
    assert event["type"] == "ready"
    assert '"instance_id": "inst-1"' in json.dumps(event)
    backend.current = cluster(READY, RunnerState.LOADING)
    event = awaited(client, "model_id=Tiny-Chat&timeout_seconds=0.05")
    assert event == {
        "type": "timeout",
        "message": "Tiny-Chat was not ready within 0.05 s: loading 2 of 4 layers.",
    }


def test_an_instance_on_a_node_that_is_away_is_not_ready(client: TestClient, backend: FakeBackend) -> None:
    first, second = backend.current.members
    away = msgspec.structs.replace(second, visibility=Visibility.AWAY)
    backend.current = msgspec.structs.replace(backend.current, members=(first, away))
    assert awaited(client, "model_id=Tiny-Chat&timeout_seconds=0.05")["type"] == "timeout"


def test_a_runner_that_is_tried_again_is_waited_for_and_one_that_is_not_ends_the_wait(
    client: TestClient, backend: FakeBackend
) -> None:
    backend.current = cluster(READY, RunnerState.FAILED, reason="load: no memory left", retries_left=2)
    event = awaited(client, "model_id=Tiny-Chat&timeout_seconds=0.05")
    assert event["type"] == "timeout"
    assert "berta tries again after a failure (load: no memory left)" in str(event["message"])
    backend.current = cluster(READY, RunnerState.FAILED, reason="load: no memory left")
    event = awaited(client, "model_id=Tiny-Chat&timeout_seconds=0")
    assert event == {
        "type": "failed",
        "message": "Tiny-Chat failed: load: no memory left\n"
        "`covey place Tiny-Chat` tries again, and `covey stop inst-1` gives up on it.",
    }


@pytest.mark.parametrize("seconds", ["-1", "301", "soon", "nan"])
def test_awaiting_for_a_time_that_is_none(client: TestClient, seconds: str) -> None:
    answer = client.get(f"/instance/await?model_id=Tiny-Chat&timeout_seconds={seconds}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "timeout_seconds")


def test_models_on_disk_and_a_status_that_is_none(client: TestClient) -> None:
    assert [model["id"] for model in client.get("/models?status=downloaded").json()["data"]] == ["Tiny-Chat"]
    assert client.get("/models?status=lost").json()["error"]["param"] == "status"


# ---- the join code ----


def test_a_rotation_names_who_has_the_new_code_and_never_the_code(client: TestClient) -> None:
    answer = client.post("/join_code/rotate", json={"proof": "good", "without": [FIRST]})
    assert answer.status_code == 200
    assert answer.json() == {"reached": ["b" * 32], "missed": [], "keys_revoked": ["laptop"], "keys_valid": []}


@pytest.mark.parametrize(
    ("body", "status"),
    [({"proof": "bad"}, 403), ({}, 400), ({"proof": "good", "without": "b"}, 400), ({"proof": 1}, 400)],
)
def test_a_rotation_without_a_proof_is_refused(client: TestClient, body: dict[str, object], status: int) -> None:
    assert client.post("/join_code/rotate", json=body).status_code == status
