"""Answers that have to be something, over HTTP: of the fake engine, which says anything, and of the demo model."""

import json
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from nodes import NodeProcess, running, until
from tiny_model import write_model

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 20},
        "age": {"type": "integer", "minimum": 1, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["tea", "chess", "rain"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}


def held_to(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


def is_person(text: str) -> bool:
    person = json.loads(text)
    return (
        list(person) == ["name", "age", "likes"]
        and 2 <= len(person["name"]) <= 20
        and 1 <= person["age"] <= 120
        and 1 <= len(person["likes"]) <= 3
        and set(person["likes"]) <= {"tea", "chess", "rain"}
    )


def body(model: Path, text: str = "Describe a person.", **fields: Any) -> dict[str, Any]:
    return {"model": str(model), "messages": [{"role": "user", "content": text}], "max_tokens": 400, **fields}


def choice_of(node: NodeProcess, model: Path, text: str = "Describe a person.", **fields: Any) -> dict[str, Any]:
    [choice] = node.post("/v1/chat/completions", body(model, text, **fields))["choices"]
    return choice


def streamed(node: NodeProcess, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices of all chunks."""
    with node.posting("/v1/chat/completions", {**asked, "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
    return [choice for line in lines for choice in json.loads(line)["choices"]]


def test_a_model_that_says_anything_says_what_it_has_to(tmp_path: Path) -> None:
    """Two stages of the fake engine, greedy and drawn; what can't be is refused, streamed or not."""
    model = write_model(tmp_path / "model.gguf", layers=4)
    with running(tmp_path, "a", "b", step_delay_ms="0") as nodes:
        serve(nodes, model)
        for fields in ({"temperature": 0}, {"seed": 2, "top_p": 0.9}):
            choice = choice_of(nodes[1], model, response_format=held_to(PERSON), **fields)
            assert is_person(choice["message"]["content"])
            assert choice["finish_reason"] == "stop"
        for stream in (True, False):
            asked = body(model, response_format=held_to({"type": "array", "contains": {}}), stream=stream)
            refused = httpx.post(nodes[0].url + "/v1/chat/completions", json=asked, timeout=30)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == "response_format.json_schema.schema"
            assert '"contains"' in refused.json()["error"]["message"]


# ---- the demo model on three nodes ----


def serve(nodes: list[NodeProcess], model: Path) -> None:
    until(lambda: all(len(node.visibility()) == len(nodes) for node in nodes))
    nodes[0].post("/place_instance", {"model_id": str(model), "min_nodes": len(nodes), "slot_count": 4})
    until(lambda: list(nodes[0].runners().values()) == ["Ready"] * len(nodes), 120)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Iterator[NodeProcess]:
    with running(tmp_path_factory.mktemp("nodes"), "a", "b", "c", engine="onnx") as nodes:
        serve(nodes, demo_model)
        yield nodes[1]


def test_a_schema(node: NodeProcess, demo_model: Path) -> None:
    """Four at once, one of them free: each is what it has to be, and the streamed text is the whole one's."""
    asked = body(demo_model, response_format=held_to(PERSON), temperature=0)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(choice_of, node, demo_model, response_format=held_to(PERSON), seed=i) for i in (1, 2, 3)]
        free = pool.submit(choice_of, node, demo_model, "Say hello.", temperature=0, max_tokens=20)
        texts = [answer.result()["message"]["content"] for answer in answers]
        assert free.result()["message"]["content"]
    print(texts)
    assert all(map(is_person, texts))
    choices = streamed(node, asked)
    assert is_person("".join(choice["delta"].get("content", "") for choice in choices))
    assert choices[-1]["finish_reason"] == "stop"


def test_a_pattern_a_grammar_and_any_object(node: NodeProcess, demo_model: Path) -> None:
    pattern = {"type": "regex", "pattern": r"(Paris|London), [0-9]{2} °C"}
    text = choice_of(node, demo_model, "The weather?", response_format=pattern)["message"]["content"]
    assert re.fullmatch(pattern["pattern"], text)
    grammar = {"type": "grammar", "grammar": 'start: "I" verb " you" ("." | "!")\nverb: " like" | " see"'}
    text = choice_of(node, demo_model, "Well?", response_format=grammar)["message"]["content"]
    assert re.fullmatch("I (like|see) you[.!]", text)
    asked = {"response_format": {"type": "json_object"}, "temperature": 0, "max_tokens": 40}
    choice = choice_of(node, demo_model, "The capital of France as JSON.", **asked)
    is_cut = choice["finish_reason"] == "length"  # the model knows no end
    assert choice["message"]["content"].startswith("{")
    assert is_cut or isinstance(json.loads(choice["message"]["content"]), dict)


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({"response_format": held_to({**PERSON, "required": ["gone"]})}, "json_schema.schema", "'gone'"),
        ({"response_format": held_to({"type": "string", "minLength": 3, "maxLength": 2})}, "schema", "minLength (3)"),
        ({"response_format": held_to({"type": "array", "uniqueItems": True})}, "schema", '"uniqueItems"'),
        ({"response_format": {"type": "regex", "pattern": "("}}, "response_format.pattern", "unclosed group"),
        ({"logit_bias": {"49152": 1}}, "logit_bias", "49152"),
    ],
)
def test_what_can_not_be(node: NodeProcess, demo_model: Path, fields: dict[str, Any], param: str, part: str) -> None:
    refused = httpx.post(node.url + "/v1/chat/completions", json=body(demo_model, **fields), timeout=30)
    error = refused.json()["error"]
    assert refused.status_code == 400
    assert param in error["param"]
    assert part in error["message"]


def test_log_probabilities_and_a_bias(node: NodeProcess, demo_model: Path) -> None:
    """Greedy: each token is its place's likeliest, and the bytes of all are the text. Banned, its first never comes."""
    asked = {"temperature": 0, "max_tokens": 12, "logprobs": True, "top_logprobs": 3}
    question = "What is the capital of France?"
    choice = choice_of(node, demo_model, question, **asked)
    content = choice["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"] or []).decode() == choice["message"]["content"]
    for token in content:
        best, *others = token["top_logprobs"]
        assert (best["token"], best["logprob"]) == (token["token"], token["logprob"])
        assert len(others) == 2
        assert sum(math.exp(each["logprob"]) for each in token["top_logprobs"]) <= 1.0001
    told = [each for part in streamed(node, body(demo_model, question, **asked)) for each in logprobs_of(part)]
    assert [token["token"] for token in told] == [token["token"] for token in content]

    with node.posting("/generate", body(demo_model, question, temperature=0)) as response:
        first = next(json.loads(line[6:]) for line in response.iter_lines() if "TextGenerated" in line)["token_ids"][0]
    banned = choice_of(node, demo_model, question, **asked, logit_bias={str(first): -100})["logprobs"]["content"][0]
    assert banned["token"] != content[0]["token"]
    assert banned["top_logprobs"][0]["token"] == content[0]["token"]


def logprobs_of(choice: dict[str, Any]) -> list[dict[str, Any]]:
    return choice["logprobs"]["content"] if "logprobs" in choice else []
