"""Takes typed, plausible values out of GGUF metadata, which strangers wrote.

Every refusal is a `CheckpointError` that names the key, so that a person can look at it in the file.
"""

from typing import Any, Final

from covey.checkpoints.checkpoint import CheckpointError

_SHOWN_CHARACTERS: Final = 40  # of a wrong value, in an error

Metadata = dict[str, Any]


def text(metadata: Metadata, key: str) -> str:
    """The non-empty text under `key`."""
    value = _present(metadata, key)
    if not isinstance(value, str) or not value:
        raise _implausible(key, value, "a text")
    return value


def optional_text(metadata: Metadata, key: str) -> str | None:
    return text(metadata, key) if metadata.get(key) not in {None, ""} else None


def optional_flag(metadata: Metadata, key: str, default: bool) -> bool:  # noqa: FBT001  # reads as a table
    value = metadata.get(key, default)
    if not isinstance(value, bool):
        raise _implausible(key, value, "true or false")
    return value


def count(metadata: Metadata, key: str, most: int) -> int:
    """The whole number under `key`, from 1 to `most`. Of a list (one value a layer) the largest."""
    value = _present(metadata, key)
    values: list[Any] = value if isinstance(value, list) else [value]  # pyright: ignore[reportUnknownVariableType]
    if not values or not all(_is_count(each) for each in values) or not 1 <= max(values) <= most:
        raise _implausible(key, value, f"a whole number from 1 to {most}")
    return max(values)


def optional_index(metadata: Metadata, key: str, end: int) -> int | None:
    """The whole number under `key` if it is there: at least 0 and below `end`."""
    value = metadata.get(key)
    if value is None:
        return None
    if not _is_count(value) or value >= end:
        raise _implausible(key, value, f"a whole number below {end}")
    return value


def texts(metadata: Metadata, key: str) -> list[str]:
    """The list of texts under `key`; not empty."""
    value = _present(metadata, key)
    if not isinstance(value, list) or {type(each) for each in value} != {str}:
        raise _implausible(key, value, "a list of texts")
    return value


def numbers(metadata: Metadata, key: str, length: int) -> list[Any]:
    """The list of `length` numbers under `key`."""
    value = _present(metadata, key)
    if not isinstance(value, list) or len(value) != length or not {type(each) for each in value} <= {int, float}:
        raise _implausible(key, value, f"a list of {length} numbers")
    return value


def _present(metadata: Metadata, key: str) -> Any:
    if key not in metadata:
        raise CheckpointError(f"the model file lacks {key!r} in its metadata, so it is no complete language model")
    return metadata[key]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _implausible(key: str, value: object, expected: str) -> CheckpointError:
    shown = f"a list of {len(value)}" if isinstance(value, list) else _shortened(repr(value))  # pyright: ignore[reportUnknownArgumentType]
    return CheckpointError(f"the model file is damaged: its {key!r} should be {expected} but is {shown}")


def _shortened(shown: str) -> str:
    return shown if len(shown) <= _SHOWN_CHARACTERS else shown[:_SHOWN_CHARACTERS] + "..."
