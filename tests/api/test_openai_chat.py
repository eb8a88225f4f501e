"""A client's fields are honoured or refused by name; nothing is dropped in silence."""

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from msgspec import structs

from covey.api import openai_chat
from covey.api.backend import ListedModel
from covey.api.errors import RequestError
from covey.schema.generation import (
    ChatMessage,
    FinishReason,
    GenerationFailed,
    GenerationFinished,
    QueueProgressed,
    Timings,
    Usage,
)
from covey.schema.ids import InstanceId, ModelId
from tests.api.fake_backend import ANSWER, CARD, FakeBackend

SMALLEST: dict[str, Any] = {"model": "Tiny-Chat", "messages": [{"role": "user", "content": "hi"}]}


def parse(**fields: Any) -> openai_chat.ChatCall:
    return openai_chat.parse(json.dumps({**SMALLEST, **fields}).encode())


def chunks(body: str) -> list[dict[str, Any]]:
    """The objects of a stream that ended as it should."""
    events = [line.removeprefix("data: ") for line in body.split("\n\n") if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


# ---- honoured ----


def test_every_sampling_field_arrives() -> None:
    call = parse(
        temperature=0,
        top_p=0.5,
        top_k=40,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=-2,
        frequency_penalty=2,
        seed=-1,
        max_tokens=5,
        stop=["\n\n", "END"],
    )
    sampling = call.request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 0.5, 40, 0.05)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.1, -2, 2)
    assert call.request.seed == 2**64 - 1
    assert call.request.token_count_max == 5
    assert call.request.stop == ("\n\n", "END")


def test_whoever_measures_gets_all_tokens() -> None:
    assert parse(ignore_eos=True).request.without_end
    assert not parse().request.without_end


def test_defaults_are_neutral_and_the_seed_is_fresh() -> None:
    request = parse().request
    assert request.sampling.temperature == 1.0
    assert request.sampling.top_k == 0
    assert request.seed is None
    assert request.token_count_max is None
    assert request.stop == ()


@pytest.mark.parametrize(("field", "value"), [("n", 1), ("n", 1.0), ("top_logprobs", 0), ("logprobs", False)])
def test_a_number_that_asks_for_nothing_may_be_written_in_any_way(field: str, value: object) -> None:
    assert parse(**{field: value}).request == parse().request


@pytest.mark.parametrize(("field", "value"), [("n", True), ("n", 1.5)])
def test_a_number_is_no_boolean(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"The field '{field}' is not supported yet"):
        parse(**{field: value})


def test_one_stop_string_and_the_newer_name_of_the_limit() -> None:
    request = parse(stop="END", max_completion_tokens=9).request
    assert request.stop == ("END",)
    assert request.token_count_max == 9


def test_text_parts_are_joined_and_developer_is_the_system() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert parse(messages=messages).request.messages == (
        ChatMessage("system", "Be brief."),
        ChatMessage("user", "one two"),
    )


def test_an_answer_can_be_sent_back_as_the_client_library_dumps_it() -> None:
    dumped = {"role": "assistant", "content": "Hi", "refusal": None, "annotations": None, "tool_calls": None}
    assert parse(messages=[*SMALLEST["messages"], dumped]).request.messages[1] == ChatMessage("assistant", "Hi")


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u-1", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "prompt_cache_key": "x"},
        {"n": 1, "tools": [], "tool_choice": "none", "logprobs": False, "response_format": {"type": "text"}},
        {"n": None, "stop": None, "seed": None, "max_tokens": None, "stream_options": None, "tools": None},
        {"max_tokens": 5, "max_completion_tokens": 5},
        {"stream_options": {"include_usage": True, "include_obfuscation": False}},
    ],
)
def test_what_asks_for_nothing_is_tolerated(fields: dict[str, Any]) -> None:
    assert parse(**fields).request.messages == (ChatMessage("user", "hi"),)


# ---- refused ----


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"logprobs": 0}, "logprobs"),
        ({"top_logprobs": False}, "top_logprobs"),
        ({"temperature": True}, "temperature"),
        ({"max_tokens": True}, "max_tokens"),
        ({"seed": False}, "seed"),
        ({"stream": 1}, "stream"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"stream_options": {"include_more": True}}, "stream_options.include_more"),
        ({"tempurature": 0.5}, "tempurature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 1e9}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 10**12}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"stop": ""}, "stop[0]"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"model": 5}, "model"),
        ({"model": ""}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "hi", "name": "Ada"}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(**fields)
    assert caught.value.status == 400
    assert caught.value.param == param
    assert f"'{param}'" in caught.value.message
    assert caught.value.message.endswith(".")


def test_a_value_out_of_range_is_told_the_range() -> None:
    with pytest.raises(RequestError, match=r"'temperature' must be from 0 to 2, and was -1\.0"):
        parse(temperature=-1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "The field 'messages' must not be empty."),
        ({"messages": "hi"}, "The field 'messages' must be a list."),
        ({"messages": ["hi"]}, "The field 'messages[0]' must be an object."),
        ({"model": ""}, "The field 'model' must not be empty."),
        ({"model": 5}, "The field 'model' must be a string."),
        ({"stop": ["x"] * 17}, "The field 'stop' must have at most 16 entries, and has 17."),
        ({"stop": 5}, "The field 'stop' must be a string or a list of strings."),
        ({"seed": 1.5}, "The field 'seed' must be a whole number."),
        ({"top_p": "all"}, "The field 'top_p' must be a number."),
        ({"stream": "yes"}, "The field 'stream' must be true or false."),
        (
            {"tool_choice": "required"},
            'The field \'tool_choice\' is not supported yet; leave it out or set it to "none" or "auto".',
        ),
    ],
)
def test_a_refusal_is_a_sentence(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(**fields)
    assert caught.value.message == message


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"5", b'"x"', b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000, b'{"model":"\\ud800"}'],
)
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        openai_chat.parse(body)
    assert caught.value.status == 400


# ---- answered ----


def test_an_answer_in_one_piece(client: TestClient, backend: FakeBackend) -> None:
    answer = client.post("/v1/chat/completions", json=SMALLEST)
    body = answer.json()
    assert answer.status_code == 200
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "Hello, world – 🐦"}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 4,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert answer.headers["server-timing"] == "queue;dur=1.0, prefill;dur=35.0, decode;dur=60.0"
    assert backend.closed == 1


def test_what_was_cached_is_told_and_is_no_work_done(client: TestClient, backend: FakeBackend) -> None:
    backend.events = [*ANSWER[:-1], GenerationFinished(FinishReason.STOP, Usage(7, 3, 5), Timings(0, 10, 1))]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    text = client.post("/v1/chat/completions", json={**SMALLEST, **options}).text
    assert chunks(text)[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 5}
    assert '"prompt_tps":200.0,' in text


@pytest.mark.parametrize("include_usage", [True, False])
def test_usage_is_streamed_only_if_asked_for(client: TestClient, *, include_usage: bool) -> None:
    options = {"stream": True, "stream_options": {"include_usage": include_usage}}
    found = chunks(client.post("/v1/chat/completions", json={**SMALLEST, **options}).text)
    assert {chunk["object"] for chunk in found} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in found}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in found if chunk["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello, world – 🐦"
    assert [chunk["usage"]["total_tokens"] for chunk in found if "usage" in chunk] == [11] * include_usage
    finishes = [choice["finish_reason"] for chunk in found for choice in chunk["choices"]]
    assert finishes == [None] * (len(finishes) - 1) + ["stop"]


def test_an_answer_cut_by_its_limit_says_so(client: TestClient, backend: FakeBackend) -> None:
    backend.events = [*ANSWER[:-1], GenerationFinished(FinishReason.LENGTH, Usage(7, 3), Timings(0, 1, 1))]
    assert client.post("/v1/chat/completions", json=SMALLEST).json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("status", "retry_after"), [(400, None), (404, None), (503, "5")])
def test_a_refusal_has_its_status_streamed_or_not(
    client: TestClient, backend: FakeBackend, *, stream: bool, status: int, retry_after: str | None
) -> None:
    backend.events = [GenerationFailed("The prompt has 9000 tokens; the context has 1024.", status)]
    answer = client.post("/v1/chat/completions", json={**SMALLEST, "stream": stream})
    assert answer.status_code == status
    assert answer.json()["error"]["message"] == "The prompt has 9000 tokens; the context has 1024."
    assert answer.headers.get("retry-after") == retry_after


@pytest.mark.parametrize("stream", [True, False])
def test_a_full_queue_says_when_to_come_back(client: TestClient, backend: FakeBackend, *, stream: bool) -> None:
    backend.events = [GenerationFailed("Busy.", 429, retry_after_s=17)]
    answer = client.post("/v1/chat/completions", json={**SMALLEST, "stream": stream})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "17")


def test_who_waits_is_told_its_place(client: TestClient, backend: FakeBackend) -> None:
    backend.events = [ANSWER[0], QueueProgressed(3, 5), QueueProgressed(1, 2), *ANSWER[1:]]
    for path in ("/v1/chat/completions", "/generate"):
        lines = client.post(path, json={**SMALLEST, "stream": True} if "chat" in path else SMALLEST).text.splitlines()
        assert [line for line in lines if line.startswith(": queued")] == [": queued 3 of 5", ": queued 1 of 2"]


def test_a_stream_that_breaks_says_so_and_is_done(client: TestClient, backend: FakeBackend) -> None:
    backend.events = [*ANSWER[:3], GenerationFailed("The node berta is lost.", 503)]
    answer = client.post("/v1/chat/completions", json={**SMALLEST, "stream": True})
    last = chunks(answer.text)[-1]
    error = {"message": "The node berta is lost.", "type": "server_error", "param": None, "code": None, "status": 503}
    assert last == {"error": error}


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_without_an_end_does_not_look_complete(
    client: TestClient, backend: FakeBackend, *, stream: bool
) -> None:
    backend.events = ANSWER[:3]
    answer = client.post("/v1/chat/completions", json={**SMALLEST, "stream": stream})
    if stream:
        assert chunks(answer.text)[-1]["error"]["status"] == 500
    else:
        assert answer.status_code == 500


def test_an_unknown_model_is_told_the_known_ones(client: TestClient) -> None:
    answer = client.post("/v1/chat/completions", json={**SMALLEST, "model": "GPT-9"})
    assert answer.status_code == 404
    assert answer.json()["error"] == {
        "message": "There is no model 'GPT-9'; listed are: Tiny-Chat.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
        "status": 404,
    }


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (400, "invalid_request_error", None),
        (404, "invalid_request_error", "model_not_found"),
        (429, "rate_limit_error", "rate_limit_exceeded"),
        (503, "server_error", None),
    ],
)
def test_errors_have_the_types_that_openais_clients_know(
    client: TestClient, backend: FakeBackend, status: int, kind: str, code: str | None
) -> None:
    """A typed client can't read an error whose code is a number."""
    backend.events = [GenerationFailed("It can't be.", status)]
    error = client.post("/v1/chat/completions", json=SMALLEST).json()["error"]
    assert (error["type"], error["code"], error["status"]) == (kind, code, status)


# ---- models ----


@pytest.mark.parametrize("name", ["Tiny-Chat", "tiny-chat"])
def test_one_model(client: TestClient, name: str) -> None:
    answer = client.get(f"/v1/models/{name}")
    assert answer.status_code == 200
    assert answer.json() == client.get("/v1/models").json()["data"][0]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("hf:owner/repo/file.gguf", "hf:owner/repo/file.gguf"),
        ("hf:owner/repo/file.gguf", "hf%3Aowner%2Frepo%2Ffile.gguf"),
        ("/models/a b.gguf", "/models/a%20b.gguf"),
        ("/models/a b.gguf", "%2Fmodels%2Fa%20b.gguf"),
    ],
)
def test_a_model_whose_id_has_slashes(client: TestClient, backend: FakeBackend, name: str, path: str) -> None:
    backend.listed = [ListedModel(structs.replace(CARD, model_id=ModelId(name)), on_disk=True)]
    answer = client.get(f"/v1/models/{path}")
    assert (answer.status_code, answer.json().get("id")) == (200, name)


def test_a_model_that_is_not_there(client: TestClient) -> None:
    answer = client.get("/v1/models/owner/GPT-9")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert answer.json()["error"]["message"] == "There is no model 'owner/GPT-9'; listed are: Tiny-Chat."


def test_the_context_of_a_model_is_the_one_that_is_served(client: TestClient, backend: FakeBackend) -> None:
    placed = backend.current.instances[0]
    more = structs.replace(placed, instance_id=InstanceId("inst-2"), context_length=1536)
    for instances, length in (((placed,), 1024), ((placed, more), 1536), ((), CARD.context_length_max)):
        backend.current = structs.replace(backend.current, instances=instances)
        (listed,) = client.get("/v1/models").json()["data"]
        assert listed["context_length"] == client.get("/v1/models/tiny-chat").json()["context_length"] == length


def test_a_model_that_is_written_nearly_so(client: TestClient) -> None:
    message = client.get("/v1/models/tiny").json()["error"]["message"]
    assert message == "There is no model 'tiny' (did you mean Tiny-Chat?); listed are: Tiny-Chat."


def test_the_document_of_the_api_tells_what_each_field_means() -> None:
    """What is accepted and changes nothing, and what is refused."""
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    for name in (*openai_chat.HARMLESS, *openai_chat.UNSUPPORTED, *openai_chat.ChatBody.model_fields):
        assert f"`{name}`" in text, name
