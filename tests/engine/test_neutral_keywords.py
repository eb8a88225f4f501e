"""Programs write schemas with the defaults spelt out: a keyword that asks for nothing is no reason to refuse one."""

import json
from typing import Any

import pytest

from covey.engine.grammar import ConstraintError, check, deep_thread
from covey.engine.neutral import without_neutral
from covey.schema.generation import Constraint, ConstraintKind

LIST: dict[str, Any] = {"type": "array", "items": {"type": "integer"}}
OBJECT: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}


def checked(schema: Any) -> None:
    constraint = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema), "schema")
    deep_thread().submit(lambda: check(constraint)).result(60)


@pytest.mark.parametrize(
    "schema",
    [
        {**LIST, "uniqueItems": False},
        {**LIST, "minItems": 0, "minContains": 1, "maxContains": 2, "unevaluatedItems": True},
        {**LIST, "contains": {"type": "null"}, "minContains": 0},
        {**OBJECT, "propertyNames": {}, "unevaluatedProperties": {}, "deprecated": False, "title": "A", "default": {}},
        {**OBJECT, "dependentRequired": {"a": []}, "dependentSchemas": {"a": True}, "dependencies": {}},
        {**OBJECT, "not": False, "if": {"required": ["a"]}, "then": True},
        {**OBJECT, "else": {"required": ["a"]}},
        {"type": "string", "minLength": 0, "format": "password"},
        {"$dynamicAnchor": "here", "$recursiveAnchor": False, **OBJECT},
        {"$ref": "#/$defs/each", "$defs": {"each": {"anyOf": [{**LIST, "uniqueItems": False}, {"type": "null"}]}}},
        {"type": "array", "items": [{**LIST, "uniqueItems": False}], "additionalItems": False},
        {"type": "object", "properties": {"not": {**LIST, "uniqueItems": False}}, "required": ["not"]},
    ],
)
def test_what_asks_for_nothing_is_left_out(schema: Any) -> None:
    checked(schema)


@pytest.mark.parametrize(
    ("keyword", "schema"),
    [
        ("uniqueItems", {**LIST, "uniqueItems": True}),
        ("uniqueItems", {**LIST, "uniqueItems": 0}),
        ("contains", {**LIST, "contains": True}),
        ("contains", {**LIST, "contains": True, "minContains": 0, "maxContains": 1}),
        ("dependentRequired", {**OBJECT, "dependentRequired": {"a": ["b"]}}),
        ("if", {**OBJECT, "if": {"required": ["a"]}, "then": True, "else": {"required": ["b"]}}),
        ("not", {**OBJECT, "not": {}}),
        ("unevaluatedProperties", {**OBJECT, "unevaluatedProperties": False}),
    ],
)
def test_what_asks_for_something_is_refused_by_name(keyword: str, schema: Any) -> None:
    with pytest.raises(ConstraintError, match=f'"{keyword}"'):
        checked(schema)


def test_what_is_no_schema_stays() -> None:
    """Names of properties and values look like keywords, and are none; the order of properties is the answer's."""
    schema = {
        "properties": {"uniqueItems": False, "then": {"const": {"not": False}}, "a": {}},
        "enum": [{"not": False}],
    }
    assert json.dumps(without_neutral(schema)) == json.dumps(schema)


def test_the_deepest_nest_is_refused_in_a_sentence() -> None:
    nest: Any = "{}"
    for _ in range(3000):
        nest = f'{{"a":{nest}}}'
    constraint = Constraint(ConstraintKind.JSON_SCHEMA, nest, "schema")
    with pytest.raises(ConstraintError, match="nested too deep"):
        deep_thread().submit(lambda: check(constraint)).result(60)
