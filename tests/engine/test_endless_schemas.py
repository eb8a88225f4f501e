"""A schema that requires itself would be answered up to the limit of tokens, and never be whole."""

from typing import Any

import pytest

from covey.engine.endless import is_endless

NODE: dict[str, Any] = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]}
EMPTY: dict[str, Any] = {"type": "null"}


def defined(root: Any, **definitions: Any) -> dict[str, Any]:
    return {**root, "$defs": definitions}


@pytest.mark.parametrize(
    "schema",
    [
        defined({"$ref": "#/$defs/node"}, node=NODE),
        defined({"type": "array", "items": {"$ref": "#/$defs/node"}, "minItems": 1}, node=NODE),
        defined({"anyOf": [{"$ref": "#/$defs/node"}, {"$ref": "#/$defs/other"}]}, node=NODE, other=NODE),
        defined({"allOf": [{"type": "object"}, {"$ref": "#/$defs/node"}]}, node=NODE),
        defined({"$ref": "#/$defs/a"}, a={"$ref": "#/$defs/b"}, b={"$ref": "#/$defs/a"}),
        {"type": "object", "additionalProperties": {"$ref": "#"}, "required": ["a"]},
        {"type": "array", "prefixItems": [{"$ref": "#"}, EMPTY], "minItems": 2},
    ],
)
def test_what_contains_itself_for_ever(schema: dict[str, Any]) -> None:
    assert is_endless(schema)


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        defined({"type": "array", "items": {"$ref": "#/$defs/node"}}, node=NODE),
        defined({"type": "array", "items": {"$ref": "#/$defs/node"}, "minItems": 0}, node=NODE),
        defined({"anyOf": [{"$ref": "#/$defs/node"}, EMPTY]}, node=NODE),
        defined({"$ref": "#/$defs/node"}, node={**NODE, "type": ["object", "null"]}),
        defined({"$ref": "#/$defs/node"}, node={**NODE, "required": []}),
        defined({"$ref": "#/$defs/node"}, node={**NODE, "properties": {"next": EMPTY, "more": {"$ref": "#"}}}),
        defined({"$ref": "#/$defs/tree~1leaf"}, **{"tree/leaf": EMPTY}),
        {"type": "object", "patternProperties": {"a": EMPTY}, "additionalProperties": {"$ref": "#"}, "required": ["a"]},
        {"const": {"$ref": "#"}},
        {"$ref": "https://example.com/schema.json"},
        defined({**NODE, "properties": {"next": {"$ref": "#leaf"}}}, end={**EMPTY, "$anchor": "leaf"}),
    ],
)
def test_what_can_end(schema: Any) -> None:
    assert not is_endless(schema)


def test_long_chains_and_deep_nests_take_no_time() -> None:
    """As long as a schema may be; each link is known only after the next."""
    chain: dict[str, Any] = {f"d{at}": {"$ref": f"#/$defs/d{at + 1}"} for at in range(1000)}
    assert not is_endless(defined({"$ref": "#/$defs/d0"}, **chain, d1000=EMPTY))
    assert is_endless(defined({"$ref": "#/$defs/d0"}, **chain, d1000={"$ref": "#/$defs/d0"}))
    nest: dict[str, Any] = {}
    for _ in range(5000):
        nest = {"allOf": [nest]}
    assert not is_endless(nest)
