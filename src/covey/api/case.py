"""Field names in two cases: exo's routes give the same objects in camelCase and in snake_case. Pure.

Renderers name their fields in snake_case as keyword arguments of a `Case`; keys that are ids are not touched.
"""

from collections.abc import Callable
from typing import Any

Case = Callable[..., dict[str, Any]]


def snake_case(**named: Any) -> dict[str, Any]:
    return named


def camel_case(**named: Any) -> dict[str, Any]:
    return {camel(name): value for name, value in named.items()}


def camel(name: str) -> str:
    """`storageSize` for `storage_size`."""
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)
