"""The sampling fields that dialects share, their ranges, and what they mean for `schema.generation.Sampling`.

A value out of its range is refused with the range; none is bent to fit.
"""

from typing import Annotated, Any, Final, cast

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from covey.api.body import DialectBody
from covey.api.response_format import ResponseFormat
from covey.schema.generation import Sampling

SEED_MODULUS: Final = 2**64  # a negative seed is taken as the unsigned number with the same bits
STOP_COUNT_MAX: Final = 16
STOP_CHARACTERS_MAX: Final = 1024
TOKEN_COUNT_MAX: Final = 2**31 - 1
BIAS_COUNT_MAX: Final = 1024  # tokens
TOP_LOGPROBS_MAX: Final = 20


def between(low: float, high: float) -> AfterValidator:
    """Accepts `low <= value <= high`; NaN is in no range."""

    def check(value: float) -> float:
        if not low <= value <= high:
            raise ValueError(f"must be from {low} to {high}, and was {value}")
        return value

    return AfterValidator(check)


def as_list(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of strings")  # noqa: TRY004 - pydantic reports ValueError
    return cast("Any", value)


def check_stop(stop: str) -> str:
    if not 0 < len(stop) <= STOP_CHARACTERS_MAX:
        raise ValueError(f"must have 1 to {STOP_CHARACTERS_MAX} characters, and has {len(stop)}")
    return stop


def check_bias(bias: dict[str, float]) -> dict[str, float]:
    odd = next((key for key in bias if not (key.isascii() and key.isdecimal() and int(key) <= TOKEN_COUNT_MAX)), None)
    if odd is not None:
        raise ValueError(f"must have token ids as its keys, and has '{odd}'")
    if len(bias) > BIAS_COUNT_MAX:
        raise ValueError(f"must have at most {BIAS_COUNT_MAX} entries, and has {len(bias)}")
    return bias


TokenCount = Annotated[int, between(1, TOKEN_COUNT_MAX)]
Seed = Annotated[int, between(-(2**63), 2**63 - 1)]
Bias = Annotated[float, between(-100, 100)]
LogitBias = Annotated[dict[str, Bias], AfterValidator(check_bias)]
Stop = Annotated[str, AfterValidator(check_stop)]
Stops = Annotated[list[Stop], Field(max_length=STOP_COUNT_MAX), BeforeValidator(as_list)]


class SamplingFields(DialectBody):
    """How the next token is picked, as OpenAI's dialect and its common extensions name it."""

    temperature: Annotated[float, between(0, 2)] = 1.0
    top_p: Annotated[float, between(0, 1)] = 1.0
    top_k: Annotated[int, between(0, 1_000_000)] = 0
    min_p: Annotated[float, between(0, 1)] = 0.0
    repetition_penalty: Annotated[float, between(0.1, 10)] = 1.0
    presence_penalty: Annotated[float, between(-2, 2)] = 0.0
    frequency_penalty: Annotated[float, between(-2, 2)] = 0.0
    logit_bias: LogitBias = Field(default_factory=dict)
    logprobs: bool = False
    top_logprobs: Annotated[int, between(0, TOP_LOGPROBS_MAX)] = 0
    response_format: ResponseFormat = ResponseFormat()

    @field_validator("top_logprobs")
    @classmethod
    def check_logprobs(cls, count: int, others: ValidationInfo) -> int:
        if count and not others.data.get("logprobs"):
            raise ValueError("needs 'logprobs' to be true")
        return count

    def sampling(self) -> Sampling:
        """These values without a seed, which is drawn or set at admission."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias={int(token_id): value for token_id, value in self.logit_bias.items()},
            top_logprobs=self.top_logprobs if self.logprobs else None,
            constraint=self.response_format.constraint(),
        )


def unsigned_seed(seed: int | None) -> int | None:
    return None if seed is None else seed % SEED_MODULUS
