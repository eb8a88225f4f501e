"""OpenAI's chat completions: a body becomes a `GenerationRequest`, its events become an answer or chunks. Pure.

Every field that a client may send is honoured, refused by name, or stands in a table here that says why it may pass.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from covey.api import sse
from covey.api.body import DialectBody, fields, json_object
from covey.api.errors import RequestError, about_model
from covey.api.generation_body import GenerationBody
from covey.api.sampling import TokenCount
from covey.schema.generation import (
    FinishReason,
    GenerationEvent,
    GenerationFailed,
    GenerationFinished,
    GenerationRequest,
    GenerationStarted,
    LikelyToken,
    PickedToken,
    PrefillProgressed,
    QueueProgressed,
    TextGenerated,
    Timings,
    Usage,
)

# A provider's book-keeping: whatever stands there, the answer is the same.
HARMLESS: Final = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
# Not supported yet, and the values that ask for nothing.
UNSUPPORTED: Final[dict[str, tuple[Any, ...]]] = {
    "audio": (),
    "chat_template_kwargs": ({},),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "prediction": (),
    "reasoning_effort": ("none",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
CHAT_FINISH_REASON: Final = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "length",  # the dialect has no word for it; a cut answer must not look whole
}


class StreamOptions(DialectBody):
    include_usage: bool = False
    include_obfuscation: bool = False


class ChatBody(GenerationBody):
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_completion_tokens: TokenCount | None = None


class ChatCall(Struct, frozen=True):
    """A parsed body: what to generate, and how to tell it."""

    request: GenerationRequest
    stream: bool
    include_usage: bool


class Answer(Struct, frozen=True):
    """What every chunk of one answer repeats."""

    answer_id: str  # "chatcmpl-..."
    created_s: int
    model_id: str


# ---- parse ----


def parse(body: bytes) -> ChatCall:
    """Raises `RequestError` naming the field that is wrong or not supported."""
    value = json_object(body)
    refuse_unsupported(value)
    known = {key: item for key, item in value.items() if key not in HARMLESS and key not in UNSUPPORTED}
    chat = fields(ChatBody, known)
    if chat.stream_options.include_obfuscation:
        raise RequestError(
            "The field 'stream_options.include_obfuscation' is not supported; leave it out or set it to false.",
            param="stream_options.include_obfuscation",
        )
    return ChatCall(chat.request(token_count_max(chat)), chat.stream, chat.stream_options.include_usage)


def refuse_unsupported(value: dict[str, Any]) -> None:
    for key, neutral in UNSUPPORTED.items():
        if key in value and not any(is_same(value[key], item) for item in neutral):
            values = " or ".join(msgspec.json.encode(item).decode() for item in neutral)
            allowed = f"leave it out or set it to {values}" if values else "leave it out"
            raise RequestError(f"The field '{key}' is not supported yet; {allowed}.", param=key)


def is_same(given: Any, neutral: Any) -> bool:
    """Equal as JSON, where 1.0 is 1, and true is not."""
    return isinstance(given, bool) is isinstance(neutral, bool) and given == neutral


def token_count_max(chat: ChatBody) -> int | None:
    """`max_completion_tokens` is the newer name of `max_tokens`."""
    older, newer = chat.max_tokens, chat.max_completion_tokens
    if older is not None and newer is not None and older != newer:
        raise RequestError(
            "The fields 'max_tokens' and 'max_completion_tokens' contradict each other; send one.", param="max_tokens"
        )
    return newer if newer is not None else older


# ---- render ----


def render_answer(
    answer: Answer, text: str, finished: GenerationFinished, picked: Sequence[PickedToken] | None
) -> dict[str, Any]:
    """The whole answer in one object. `picked` None: log probabilities were not asked for."""
    told = {} if picked is None else {"logprobs": render_logprobs(picked)}
    return {
        "id": answer.answer_id,
        "object": "chat.completion",
        "created": answer.created_s,
        "model": answer.model_id,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                **told,
                "finish_reason": CHAT_FINISH_REASON[finished.reason],
            }
        ],
        "usage": render_usage(finished.usage),
    }


def render_logprobs(picked: Sequence[PickedToken]) -> dict[str, Any]:
    content = [
        {**render_token(token), "top_logprobs": [render_token(likely) for likely in token.likeliest]}
        for token in picked
    ]
    return {"content": content, "refusal": None}


def render_token(token: LikelyToken) -> dict[str, Any]:
    """Bytes are null where a token is no text."""
    return {"token": token.text, "logprob": token.logprob, "bytes": token.text_bytes or None}


def render_usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


class StreamRenderer:
    """The events of one answer, as the bytes of its stream."""

    def __init__(self, answer: Answer, *, include_usage: bool) -> None:
        self._answer = answer
        self._include_usage = include_usage

    def render(self, event: GenerationEvent) -> Iterator[bytes]:
        match event:
            case GenerationStarted():
                yield self._chunk({"role": "assistant", "content": ""})
            case QueueProgressed():
                yield sse.queued(event.position, event.waiting_requests)
            case PrefillProgressed():
                yield sse.comment("prefill_progress", self._progress(event))
            case TextGenerated():
                yield from self._text(event)
            case GenerationFinished():
                yield from self._end(event)
            case GenerationFailed():
                yield sse.failure(about_model(RequestError(event.message, status=event.status, param=event.param)))
                yield sse.DONE

    def _text(self, event: TextGenerated) -> Iterator[bytes]:
        """A token may add no text, and its log probability is told even so."""
        if event.picked:
            yield self._chunk({"content": event.text}, logprobs=render_logprobs(event.picked))
        elif event.text:
            yield self._chunk({"content": event.text})

    def _end(self, event: GenerationFinished) -> Iterator[bytes]:
        yield self._chunk({}, CHAT_FINISH_REASON[event.reason])
        if self._include_usage:
            yield sse.data({**self._head(), "choices": [], "usage": render_usage(event.usage)})
        yield sse.comment("generation_stats", render_statistics(event.usage, event.timings))
        yield sse.DONE

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._answer.answer_id,
            "object": "chat.completion.chunk",
            "created": self._answer.created_s,
            "model": self._answer.model_id,
        }

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None, **told: Any) -> bytes:
        choice = {"index": 0, "delta": delta, **told, "finish_reason": finish_reason}
        return sse.data({**self._head(), "choices": [choice]})

    def _progress(self, event: PrefillProgressed) -> dict[str, Any]:
        return {
            "PrefillProgressChunk": {
                "model": self._answer.model_id,
                "processed_tokens": event.processed_tokens,
                "total_tokens": event.total_tokens,
            }
        }


def render_statistics(usage: Usage, timings: Timings) -> dict[str, Any]:
    return {
        "prompt_tps": tokens_per_second(usage.prompt_tokens - usage.cached_tokens, timings.prefill_ms),
        "generation_tps": tokens_per_second(usage.completion_tokens - 1, timings.decode_ms),
        "prompt_tokens": usage.prompt_tokens,
        "generation_tokens": usage.completion_tokens,
    }


def tokens_per_second(tokens: int, milliseconds: float) -> float:
    return round(1000 * tokens / milliseconds, 2) if tokens > 0 and milliseconds > 0 else 0.0
