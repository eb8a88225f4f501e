"""Whole conversations with the API as text, to be read as a client would see them."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from covey.schema.cluster import Refused
from covey.schema.generation import GenerationFailed
from covey.schema.runner import RunnerState
from tests.api.fake_backend import ANSWER, FakeBackend, cluster
from tests.golden import check

GOLDEN = Path(__file__).parent / "golden"
CHAT = {"model": "Tiny-Chat", "messages": [{"role": "user", "content": "Say hello."}]}
LOADING = cluster(RunnerState.READY, RunnerState.LOADING)
BROKEN = (*ANSWER[:3], GenerationFailed("The node berta is lost.", 503))

Call = tuple[str, str, Any]
CONVERSATIONS: dict[str, tuple[FakeBackend, list[Call]]] = {
    "chat": (FakeBackend(), [("POST", "/v1/chat/completions", CHAT)]),
    "chat_stream": (
        FakeBackend(),
        [("POST", "/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}})],
    ),
    "chat_breaks": (FakeBackend(events=BROKEN), [("POST", "/v1/chat/completions", {**CHAT, "stream": True})]),
    "generate": (FakeBackend(), [("POST", "/generate", CHAT)]),
    "errors": (
        FakeBackend(),
        [
            ("POST", "/v1/chat/completions", {**CHAT, "n": 3}),
            ("POST", "/v1/chat/completions", {**CHAT, "temperature": 7}),
            ("POST", "/v1/chat/completions", {**CHAT, "model": "GPT-9"}),
            ("GET", "/v1/chat/completions", None),
            ("GET", "/nowhere", None),
            ("GET", "/state/nodeMemory/nobody", None),
            ("GET", "/instance/none", None),
            ("POST", "/place_instance", {"model_id": "Tiny-Chat", "sharding": "Cfg"}),
        ],
    ),
    "models": (FakeBackend(), [("GET", "/v1/models", None), ("GET", "/models?status=downloaded", None)]),
    "instance": (
        FakeBackend(),
        [
            ("POST", "/place_instance", {"model_id": "Tiny-Chat", "min_nodes": 2}),
            ("GET", "/instance/await?model_id=Tiny-Chat&timeout_seconds=5", None),
            ("GET", "/instance/inst-1", None),
            ("DELETE", "/instance/inst-1", None),
        ],
    ),
    "await_times_out": (
        FakeBackend(current=LOADING),
        [("GET", "/instance/await?model_id=Tiny-Chat&timeout_seconds=0.1", None)],
    ),
    "place_is_refused": (
        FakeBackend(outcome=Refused("Tiny-Chat needs 9 GB and the cluster has 2 GB free: anna 1 GB, berta 1 GB.", 409)),
        [("POST", "/place_instance", {"model_id": "Tiny-Chat"})],
    ),
    "state": (FakeBackend(current=LOADING), [("GET", "/state", None), ("GET", "/node_id", None)]),
    "cluster": (FakeBackend(current=LOADING), [("GET", "/cluster", None)]),
}


def told(client: TestClient, call: Call) -> str:
    """The request and the answer as a person would write them down, without what differs each time."""
    method, path, body = call
    answer = client.request(method, path, json=body)
    asked = f">>> {method} {path}\n" + (f"{json.dumps(body)}\n" if body is not None else "")
    return f"{asked}<<< {answer.status_code} {answer.headers['content-type']}\n{steady(pretty(answer))}\n"


def pretty(answer: httpx.Response) -> str:
    if answer.headers["content-type"].startswith("application/json"):
        return json.dumps(answer.json(), indent=1, ensure_ascii=False)
    return answer.text.strip()


def steady(text: str) -> str:
    text = re.sub(r"chatcmpl-[0-9a-f]{32}", "chatcmpl-ID", text)
    text = re.sub(r'"created": ?\d+', '"created":0', text)
    return re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME", text)


@pytest.mark.parametrize("name", sorted(CONVERSATIONS))
def test_conversation(name: str, client_of: Any) -> None:
    backend, calls = CONVERSATIONS[name]
    client = client_of(backend)
    check(GOLDEN / f"{name}.txt", "\n".join(told(client, call) for call in calls))
