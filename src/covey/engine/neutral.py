"""Leaves out of a JSON schema what asks for nothing: keywords that the library refuses, whatever they say. Pure.

Programs that write schemas write them with their defaults (`"uniqueItems": false`). What a keyword asks for is JSON
Schema's Core and Validation, draft 2020-12, and for `dependencies` draft 7.
"""

from collections.abc import Callable
from typing import Any, Final, cast

from covey.engine.endless import DEPTH_MAX, Schema

ANYTHING: Final = (True, {})  # what all JSON satisfies
SINGLE: Final = frozenset((
    "items", "additionalItems", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else",
    "unevaluatedItems", "unevaluatedProperties",
))  # fmt: skip
LISTS: Final = frozenset(("allOf", "anyOf", "oneOf", "prefixItems", "items"))
BY_NAME: Final = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))


def without_neutral(schema: Any, depth: int = 0) -> Any:
    """`schema`: JSON that was decoded. Only schemas are looked into, and not what merely looks like one."""
    if not isinstance(schema, dict) or depth > DEPTH_MAX:
        return schema
    inner = {key: _inside(key, value, depth + 1) for key, value in cast("Schema", schema).items()}
    return {key: value for key, value in inner.items() if key not in NEUTRAL or not NEUTRAL[key](inner)}


def _inside(key: str, value: Any, depth: int) -> Any:
    if key in BY_NAME and isinstance(value, dict):
        return {name: without_neutral(each, depth) for name, each in cast("Schema", value).items()}
    if key in LISTS and isinstance(value, list):
        return [without_neutral(each, depth) for each in cast("list[Any]", value)]
    return without_neutral(value, depth) if key in SINGLE else value


def _is_anything(key: str) -> Callable[[Schema], bool]:
    return lambda entries: _is_one_of(entries[key], ANYTHING)


def _is_one_of(value: Any, wanted: tuple[Any, ...]) -> bool:
    """By type too: 1 is not True."""
    return any(type(value) is type(each) and value == each for each in wanted)


def _has_no_contains(entries: Schema) -> bool:
    return "contains" not in entries


def _may_contain_none(entries: Schema) -> bool:
    return _is_one_of(entries.get("minContains"), (0,)) and "maxContains" not in entries


def _asks_dependents_for_nothing(key: str) -> Callable[[Schema], bool]:
    def asks_for_nothing(entries: Schema) -> bool:
        dependents = entries[key]
        return isinstance(dependents, dict) and all(
            _is_one_of(each, ([], *ANYTHING)) for each in cast("Schema", dependents).values()
        )

    return asks_for_nothing


def _chooses_nothing(entries: Schema) -> bool:
    """One of if, then and else, where no case has anything to keep to."""
    cases = [entries[key] for key in ("then", "else") if key in entries]
    return "if" not in entries or all(_is_one_of(each, ANYTHING) for each in cases)


# Of each keyword, whether it asks for nothing among the entries of its schema.
NEUTRAL: Final[dict[str, Callable[[Schema], bool]]] = {
    "uniqueItems": lambda entries: entries["uniqueItems"] is False,
    "contains": _may_contain_none,
    "minContains": lambda entries: _has_no_contains(entries) or _may_contain_none(entries),
    "maxContains": _has_no_contains,
    "propertyNames": _is_anything("propertyNames"),
    "unevaluatedItems": _is_anything("unevaluatedItems"),
    "unevaluatedProperties": _is_anything("unevaluatedProperties"),
    "dependentRequired": _asks_dependents_for_nothing("dependentRequired"),
    "dependentSchemas": _asks_dependents_for_nothing("dependentSchemas"),
    "dependencies": _asks_dependents_for_nothing("dependencies"),
    "not": lambda entries: entries["not"] is False,
    "if": _chooses_nothing,
    "then": _chooses_nothing,
    "else": _chooses_nothing,
    "format": lambda entries: entries["format"] == "password",  # it asks whoever shows it to hide it
    "$dynamicAnchor": lambda _: True,  # names, which the library refuses where they are used
    "$recursiveAnchor": lambda _: True,
}
