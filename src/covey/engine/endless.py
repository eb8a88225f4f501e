"""Finds JSON schemas that only endless JSON would satisfy: what they require contains itself again. Pure.

Masks can't show that, since there always is a next token. A reference ends if what it points to has an instance that
ends; which do is the least set that is closed under the rules of `_ends`. Where a keyword is not understood here, it is
taken for one that ends: nothing is refused that could be satisfied.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any, Final, cast

DEPTH_MAX: Final = 200  # the library refuses what is nested deeper

Schema = dict[str, Any]


def is_endless(schema: Any) -> bool:
    """Whether no finite JSON satisfies `schema`, which is JSON that was decoded."""
    targets = {ref: _resolved(schema, ref) for ref in _references(schema)}
    needed = {name: set(_references(target)) for name, target in targets.items()}
    return not _ends(schema, closed(needed, lambda name, ending: _ends(targets[name], ending)))


def closed(needed: Mapping[str, Set[str]], ends: Callable[[str, Set[str]], bool]) -> Set[str]:
    """The names that end: the least set that has all of which `ends` says so, given itself. `needed`: of each name,
    those that it hears of.
    """
    users: defaultdict[str, list[str]] = defaultdict(list)
    for name, others in needed.items():
        for other in others:
            users[other].append(name)
    ending, waiting = set[str](), list(needed)
    while waiting:
        name = waiting.pop()
        if name not in ending and ends(name, ending):
            ending.add(name)
            waiting += users[name]
    return ending


def _references(schema: Any) -> Iterator[str]:
    """All local ones, wherever they stand."""
    waiting = [schema]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            entries = cast("Schema", each)
            ref = entries.get("$ref")
            if isinstance(ref, str) and ref.startswith("#"):
                yield ref
            waiting += entries.values()
        elif isinstance(each, list):
            waiting += cast("list[Any]", each)


def _resolved(schema: Any, ref: str) -> Any:
    """What a JSON pointer leads to; True, which anything satisfies, where it leads nowhere, and for an `$anchor`."""
    if ref != "#" and not ref.startswith("#/"):
        return True
    for part in ref.removeprefix("#").split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(schema, dict) or key not in schema:
            return True
        schema = cast("Schema", schema)[key]
    return schema


def _ends(schema: Any, ending: Set[str], depth: int = 0) -> bool:
    """`ending`: the references that are known to end."""
    if not isinstance(schema, dict) or depth > DEPTH_MAX:
        return True
    entries = cast("Schema", schema)
    ref = entries.get("$ref")
    if isinstance(ref, str) and ref.startswith("#") and ref not in ending:
        return False
    if "const" in entries or "enum" in entries:
        return True
    if not all(_ends(each, ending, depth + 1) for each in (*_listed(entries, "allOf"), *_required(entries))):
        return False
    choices = [_listed(entries, key) for key in ("anyOf", "oneOf")]
    return all(not each or any(_ends(choice, ending, depth + 1) for choice in each) for each in choices)


def _required(entries: Schema) -> list[Any]:
    """The schemas of what an instance must have: of its parts, if it can only be an object or a list."""
    kind = entries.get("type")
    if kind in ("object", ["object"]):
        properties, others = entries.get("properties"), entries.get("additionalProperties")
        known = cast("Schema", properties) if isinstance(properties, dict) else {}
        others = None if "patternProperties" in entries else others  # which of them a name has is not asked here
        return [known.get(name, others) for name in _listed(entries, "required") if isinstance(name, str)]
    least = entries.get("minItems")
    if kind in ("array", ["array"]) and isinstance(least, int):
        first = _listed(entries, "prefixItems")
        return [*first[:least], *([entries.get("items")] if least > len(first) else [])]
    return []


def _listed(entries: Schema, key: str) -> list[Any]:
    value = entries.get(key)
    return cast("list[Any]", value) if isinstance(value, list) else []
