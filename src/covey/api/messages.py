"""The chat messages of a body: roles, and content as a string or as a list of text parts."""

from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, model_validator

from covey.api.body import DialectBody, without_nulls
from covey.schema.generation import ChatMessage

ROLE_IN_TEMPLATES = {"developer": "system"}  # OpenAI's newer name for the same thing; templates know the older one


def check_part(value: Any) -> Any:
    """Refuses a part that is not text by the name of its kind."""
    kind = cast("dict[str, Any]", value).get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind != "text":
        raise ValueError(f"is of type '{kind}', which is not supported; only 'text' is")
    return cast("Any", value)


def as_parts(value: Any) -> Any:
    """A string is a list of one text part."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")  # noqa: TRY004 - pydantic reports ValueError
    return cast("Any", value)


class TextPart(DialectBody):
    type: Literal["text"]
    text: str


Part = Annotated[TextPart, BeforeValidator(check_part)]


class Message(DialectBody):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], Field(min_length=1), BeforeValidator(as_parts)]

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, value: Any) -> Any:
        """OpenAI's clients send an answer back with every field that it could have had."""
        return without_nulls(cast("dict[str, Any]", value)) if isinstance(value, dict) else value

    def chat_message(self) -> ChatMessage:
        return ChatMessage(ROLE_IN_TEMPLATES.get(self.role, self.role), "".join(part.text for part in self.content))
