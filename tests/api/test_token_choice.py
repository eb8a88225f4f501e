"""What a client may say about the choice of tokens beside the usual numbers, and what it may be told of it."""

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

from covey.api import openai_chat
from covey.api.errors import RequestError
from covey.schema.generation import (
    Constraint,
    ConstraintKind,
    GenerationFailed,
    LikelyToken,
    PickedToken,
    Sampling,
    TextGenerated,
)
from tests.api.fake_backend import ANSWER, FakeBackend
from tests.api.test_openai_chat import SMALLEST, chunks

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"const": "é"}}}
HELLO = PickedToken(11, "Hello", (72, 101, 108, 108, 111), -0.25, (LikelyToken(2, "<|im_end|>", (), -9999.0),))
HALF = PickedToken(12, "\ufffd", (0xF0, 0x9F), -1.5)
TOLD = (ANSWER[0], TextGenerated("Hello", (11,), (HELLO,)), TextGenerated("", (12,), (HALF,)), ANSWER[-1])
LOGPROBS: dict[str, Any] = {
    "content": [
        {
            "token": "Hello",
            "logprob": -0.25,
            "bytes": [72, 101, 108, 108, 111],
            "top_logprobs": [{"token": "<|im_end|>", "logprob": -9999.0, "bytes": None}],
        },
        {"token": "\ufffd", "logprob": -1.5, "bytes": [0xF0, 0x9F], "top_logprobs": []},
    ],
    "refusal": None,
}


def sampling(**fields: Any) -> Sampling:
    return openai_chat.parse(json.dumps({**SMALLEST, **fields}).encode()).request.sampling


@pytest.mark.parametrize(
    ("given", "constraint"),
    [
        ({"type": "text"}, None),
        (
            {"type": "json_object"},
            Constraint(ConstraintKind.JSON_SCHEMA, '{"type":"object"}', "response_format"),
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "strict": None, "schema": SCHEMA}},
            Constraint(
                ConstraintKind.JSON_SCHEMA,
                '{"type":"object","properties":{"b":{"type":"integer"},"a":{"const":"é"}}}',
                "response_format.json_schema.schema",
            ),
        ),
        (
            {"type": "regex", "pattern": "a+"},
            Constraint(ConstraintKind.REGEX, "a+", "response_format.pattern"),
        ),
        (
            {"type": "grammar", "grammar": 'start: "a"'},
            Constraint(ConstraintKind.GRAMMAR, 'start: "a"', "response_format.grammar"),
        ),
    ],
)
def test_what_an_answer_has_to_be(given: dict[str, Any], constraint: Constraint | None) -> None:
    """A schema keeps the order of its properties, which is the order of the answer's."""
    assert sampling(response_format=given).constraint == constraint


def test_a_bias_and_log_probabilities() -> None:
    asked = sampling(logit_bias={"7": -100, "50256": 1.5}, logprobs=True, top_logprobs=3)
    assert (asked.logit_bias, asked.top_logprobs) == ({7: -100, 50256: 1.5}, 3)
    assert sampling(logprobs=True).top_logprobs == 0
    assert sampling(logprobs=False, top_logprobs=0).top_logprobs is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "regex", "grammar": "x"}}, "response_format"),
        ({"response_format": {"type": "json_object", "pattern": "x"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"logprobs": 0}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": False}, "top_logprobs"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"hello": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"7": 101}}, "logit_bias.7"),
        ({"logit_bias": {"7": True}}, "logit_bias.7"),
        ({"logit_bias": {str(each): 1 for each in range(1025)}}, "logit_bias"),
    ],
)
def test_a_wrong_one_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        sampling(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert f"'{param}'" in caught.value.message


@pytest.mark.parametrize("stream", [True, False])
def test_a_constraint_that_is_refused_is_named(client: TestClient, backend: FakeBackend, *, stream: bool) -> None:
    backend.events = [GenerationFailed("No.", 400, param="response_format.pattern")]
    answer = client.post("/v1/chat/completions", json={**SMALLEST, "stream": stream})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "response_format.pattern")


def test_log_probabilities_of_a_whole_answer(client: TestClient, backend: FakeBackend) -> None:
    backend.events = TOLD
    choice = client.post("/v1/chat/completions", json={**SMALLEST, "logprobs": True}).json()["choices"][0]
    assert choice["logprobs"] == LOGPROBS
    backend.events = ANSWER
    assert "logprobs" not in client.post("/v1/chat/completions", json=SMALLEST).json()["choices"][0]


def test_log_probabilities_of_a_stream(client: TestClient, backend: FakeBackend) -> None:
    """Half a character adds no text yet, and is told with an empty one."""
    backend.events = TOLD
    text = client.post("/v1/chat/completions", json={**SMALLEST, "stream": True, "logprobs": True}).text
    choices = [chunk["choices"][0] for chunk in chunks(text)]
    told = [(choice["delta"]["content"], choice["logprobs"]["content"]) for choice in choices if "logprobs" in choice]
    assert told == [("Hello", LOGPROBS["content"][:1]), ("", LOGPROBS["content"][1:])]


def test_log_probabilities_in_our_own_dialect(client: TestClient, backend: FakeBackend) -> None:
    backend.events = TOLD
    lines = client.post("/generate", json={**SMALLEST, "logprobs": True}).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if "TextGenerated" in line]
    assert events[0]["picked"][0]["likeliest"][0]["text"] == "<|im_end|>"
