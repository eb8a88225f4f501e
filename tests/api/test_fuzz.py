"""Whatever JSON comes, the answer is an answer or says what was wrong with it: never a 500."""

import json
import re
from typing import Any

import hypothesis.strategies as st
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings

from covey.api import body, openai_chat
from covey.api.generation_body import GenerationBody
from covey.api.server import create_app
from tests.api.fake_backend import FakeBackend

CLIENT = TestClient(create_app(FakeBackend()), raise_server_exceptions=False)
FIELDS = sorted({*openai_chat.ChatBody.model_fields, *openai_chat.HARMLESS, *openai_chat.UNSUPPORTED})
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
ANY_JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10)
NEAR_MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool", ""]) | ANY_JSON,
        "content": st.text() | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": st.text()})) | ANY_JSON,
        "name": ANY_JSON,
    },
)
NEAR_CHAT = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(FIELDS, ANY_JSON),
        "model": st.just("Tiny-Chat") | ANY_JSON,
        "messages": st.lists(NEAR_MESSAGE) | ANY_JSON,
        "stream": st.booleans() | ANY_JSON,
    },
)
# A validator's own words ("Input should be", "List must have") and its classes' names are not for a person.
SENTENCE = re.compile(
    r"The fields? '.+' (must (?!be a valid)|is |contradict).*[^.]\.|The body.+\.|There is no model '.*'.+\.", re.DOTALL
)
QUICK = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def assert_sensible(content: bytes) -> None:
    answer = CLIENT.post("/v1/chat/completions", content=content)
    assert answer.status_code in {200, 400, 404}, answer.text
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert SENTENCE.fullmatch(error["message"]), error["message"]


@QUICK
@given(ANY_JSON | NEAR_CHAT)
def test_any_json(value: Any) -> None:
    assert_sensible(json.dumps(value).encode())


@QUICK
@given(st.binary(max_size=200))
def test_any_bytes(content: bytes) -> None:
    assert_sensible(content)


def test_the_fields_that_are_fuzzed_are_those_that_exist() -> None:
    assert set(GenerationBody.model_fields) <= set(FIELDS)
    assert body.BODY_BYTES_MAX > 1024
