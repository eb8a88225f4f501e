"""`response_format`: what an answer has to be. OpenAI's kinds, and two that other servers have made common.

    {"type": "text"}
    {"type": "json_object"}
    {"type": "json_schema", "json_schema": {"name": "...", "schema": {...}}}
    {"type": "regex", "pattern": "..."}
    {"type": "grammar", "grammar": "..."}          in Lark's notation

`regex` is Together's; `grammar` has OpenAI's field, and the notation of its custom tools.
"""

from typing import Any, Final, Literal, cast

import msgspec
from pydantic import Field, model_validator

from covey.api.body import DialectBody, without_nulls
from covey.schema.generation import Constraint, ConstraintKind

# Of each kind, the field that says more.
FIELD_OF: Final = {"json_schema": "json_schema", "regex": "pattern", "grammar": "grammar"}


class JsonSchema(DialectBody):
    """`name` and `description` are for models that are told of the schema; ours is held to it, strictly or not."""

    name: str = ""
    description: str = ""
    strict: bool = True
    definition: dict[str, Any] = Field(alias="schema")

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, value: Any) -> Any:
        return without_nulls(cast("dict[str, Any]", value)) if isinstance(value, dict) else value


class ResponseFormat(DialectBody):
    type: Literal["text", "json_object", "json_schema", "regex", "grammar"] = "text"
    json_schema: JsonSchema | None = None
    pattern: str | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def check_fields(self) -> "ResponseFormat":
        wanted = FIELD_OF.get(self.type)
        given = [name for name in FIELD_OF.values() if getattr(self, name) is not None]
        if wanted and wanted not in given:
            raise ValueError(f"is of type '{self.type}' and must have '{wanted}'")
        if other := next((name for name in given if name != wanted), None):
            raise ValueError(f"is of type '{self.type}' and must not have '{other}'")
        return self

    def constraint(self) -> Constraint | None:
        if self.json_schema is not None:
            text = msgspec.json.encode(self.json_schema.definition).decode()
            return Constraint(ConstraintKind.JSON_SCHEMA, text, "response_format.json_schema.schema")
        if self.pattern is not None:
            return Constraint(ConstraintKind.REGEX, self.pattern, "response_format.pattern")
        if self.grammar is not None:
            return Constraint(ConstraintKind.GRAMMAR, self.grammar, "response_format.grammar")
        if self.type == "json_object":
            return Constraint(ConstraintKind.JSON_SCHEMA, '{"type":"object"}', "response_format")
        return None
