"""Whatever JSON comes, the answer is an answer or says what was wrong with it: never a 500."""

import json
import re
from typing import Any
from urllib.parse import quote

import httpx
import hypothesis.strategies as st
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings

from covey.api import body, openai_chat
from covey.api.generation_body import GenerationBody
from covey.api.guard import Access
from covey.api.server import create_app, create_guarded_app
from tests.api.fake_backend import FakeBackend

CLIENT = TestClient(create_app(FakeBackend()), raise_server_exceptions=False)
GUARDED = TestClient(
    create_guarded_app(FakeBackend(), Access()),
    base_url="http://localhost",
    client=("127.0.0.1", 1),
    raise_server_exceptions=False,
)
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
        assert set(error) == {"message", "type", "param", "code", "status"}
        assert SENTENCE.fullmatch(error["message"]), error["message"]


@QUICK
@given(ANY_JSON | NEAR_CHAT)
def test_any_json(value: Any) -> None:
    assert_sensible(json.dumps(value).encode())


@QUICK
@given(st.binary(max_size=200))
def test_any_bytes(content: bytes) -> None:
    assert_sensible(content)


def assert_envelope(answer: httpx.Response, statuses: set[int]) -> None:
    assert answer.status_code in statuses, answer.text
    if answer.is_error:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code", "status"}


@QUICK
@given(ANY_JSON | st.fixed_dictionaries({"name": st.text(max_size=70) | ANY_JSON}))
def test_any_key(value: Any) -> None:
    assert_envelope(GUARDED.post("/keys", content=json.dumps(value).encode()), {201, 400})


@QUICK
@given(st.text(max_size=50).filter(bool))
def test_any_name_in_an_address(name: str) -> None:
    quoted = quote(name, safe="")
    for path in (f"/keys/{quoted}", f"/instance/{quoted}"):
        assert_envelope(GUARDED.delete(path), {200, 400, 404, 405})  # the fake accepts; "." and "/" are no names
    for path in (f"/state/{quoted}", f"/instance/{quoted}"):
        assert_envelope(GUARDED.get(path), {200, 307, 400, 404})


@QUICK
@given(st.text(max_size=50), st.text(max_size=20))
def test_any_cursor_and_limit(cursor: str, limit: str) -> None:
    assert_envelope(GUARDED.get("/events", params={"after": cursor, "limit": limit}), {200, 400})


HEADERS = st.sampled_from(
    ["Host", "Origin", "Authorization", "x-api-key", "If-None-Match", "Content-Length", "X-Forwarded-For", "Cookie"]
)


@QUICK
@given(st.dictionaries(HEADERS, st.text(st.characters(max_codepoint=255), max_size=60)))
def test_any_header(headers: dict[str, str]) -> None:
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    for path in ("/cluster", "/state", "/keys"):
        assert_envelope(GUARDED.get(path, headers=raw), {200, 304, 401, 403, 421})


def test_the_fields_that_are_fuzzed_are_those_that_exist() -> None:
    assert set(GenerationBody.model_fields) <= set(FIELDS)
    assert body.BODY_BYTES_MAX > 1024
