"""Turns a request's bytes into checked fields: JSON, then a pydantic model, with one sentence about what is wrong.

Every dialect reads its body through `fields`. A null is the same as an absent field, as OpenAI's own clients send it.
"""

from typing import Any, Final, TypeVar, cast

import msgspec
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from covey.api.errors import RequestError

BODY_BYTES_MAX = 8 * 1024 * 1024  # a context of 1 M tokens is about 4 MB of text
BODY_S_MAX = 60.0  # the largest body over the slowest Wi-Fi that anybody would use for this
BODIES_BYTES_MAX = 64 * 1024 * 1024  # that are being read at one time, by all clients together

# What a field must be, by pydantic's kind of error; in braces stand the limits that it tells.
REASONS: Final = {
    "bool_type": "must be true or false",
    "float_type": "must be a number",
    "greater_than_equal": "must be at least {ge}",
    "int_type": "must be a whole number",
    "less_than_equal": "must be at most {le}",
    "list_type": "must be a list",
    "model_type": "must be an object",
    "string_too_short": "must not be empty",
    "string_type": "must be a string",
    "too_long": "must have at most {max_length} entries, and has {actual_length}",
    "too_short": "must not be empty",
}

Body = TypeVar("Body", bound="DialectBody")


class DialectBody(BaseModel):
    """A body in which an unknown field is an error, and a text is not taken for a number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def json_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`, without its nulls at the top. Raises `RequestError`."""
    if not body.strip():
        raise RequestError("The body is empty; it must be a JSON object.")
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"The body is not valid JSON: {error}.") from None
    except RecursionError:
        raise RequestError("The body's JSON is nested too deeply.") from None
    if not isinstance(value, dict):
        raise RequestError("The body must be a JSON object.")
    return without_nulls(cast("dict[str, Any]", value))


def without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if item is not None}


def fields(model: type[Body], value: dict[str, Any]) -> Body:
    """`value` as a `model`. Raises `RequestError` naming the first wrong field."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        raise complaint(details[0]) from None


def complaint(detail: ErrorDetails) -> RequestError:
    """One sentence about one wrong field."""
    name = field_name(detail["loc"])
    if detail["type"] == "extra_forbidden":
        return RequestError(f"The field '{name}' is not known here. Leave it out.", param=name)
    if detail["type"] == "missing":
        return RequestError(f"The field '{name}' is missing.", param=name)
    return RequestError(f"The field '{name}' {reason(detail)}.", param=name)


def reason(detail: ErrorDetails) -> str:
    """What follows the field's name: our own words for pydantic's kinds of errors, or those of our own validators."""
    if words := REASONS.get(detail["type"]):
        return words.format(**detail.get("ctx", {}))
    return detail["msg"].removeprefix("Value error, ").removeprefix("Input ").replace("should ", "must ", 1)


def field_name(location: tuple[int | str, ...]) -> str:
    """`messages[0].content` for `("messages", 0, "content")`."""
    name = ""
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name or "body"
