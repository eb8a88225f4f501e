"""The fields of a request for text that all our chat dialects share, and the `GenerationRequest` that they mean."""

from pydantic import Field, ValidationInfo, field_validator

from covey.api.messages import Message
from covey.api.response_format import ResponseFormat
from covey.api.sampling import SamplingFields, Seed, Stops, TokenCount, unsigned_seed
from covey.schema.generation import GenerationRequest
from covey.schema.ids import ModelId


class GenerationBody(SamplingFields):
    model: str = Field(min_length=1)
    messages: list[Message] = Field(min_length=1)
    max_tokens: TokenCount | None = None
    stop: Stops = Field(default_factory=list)
    seed: Seed | None = None
    ignore_eos: bool = False

    @field_validator("ignore_eos")
    @classmethod
    def check_end(cls, ignores: bool, others: ValidationInfo) -> bool:  # noqa: FBT001 - pydantic's shape
        form = others.data.get("response_format")
        if ignores and isinstance(form, ResponseFormat) and form.constraint():
            raise ValueError("must not be true beside a 'response_format': what is complete has to end")
        return ignores

    def request(self, token_count_max: int | None) -> GenerationRequest:
        """`model_id` is the name as it was sent, until the server has resolved it."""
        return GenerationRequest(
            model_id=ModelId(self.model),
            messages=tuple(message.chat_message() for message in self.messages),
            sampling=self.sampling(),
            seed=unsigned_seed(self.seed),
            token_count_max=token_count_max,
            stop=tuple(self.stop),
            without_end=self.ignore_eos,
        )
