"""One request for text, and the events that answer it: between `api` and `serving`, and between `serving` and a head.

The second half is the data plane's protocol: `serving` opens a TCP connection to the head's data port, sends
`ServeHello`, then any number of `Admit` and `Cancel`, and gets `HeadEvent`s back. Frames are as in `wire`. One that can
prove that it is alive is told how often to (`ProveAlive`): a node that was stopped, or hangs, closes nothing, and its
requests would hold their slots to the end.
"""

from enum import StrEnum
from typing import Final

from msgspec import Struct

from covey.schema.ids import ModelId, RequestId

PREFILL_CHUNK_TOKENS: Final = 128  # of a prompt, in one step: nearly its full speed, and others wait for no more


class FinishReason(StrEnum):
    STOP = "stop"  # the model ended its turn, or a stop string came
    LENGTH = "length"  # the token limit or the context's end
    CANCELLED = "cancelled"


class ConstraintKind(StrEnum):
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    GRAMMAR = "grammar"  # in Lark's notation


class Constraint(Struct, frozen=True):
    """What an answer has to be, from its first token to its last."""

    kind: ConstraintKind
    text: str  # the schema as JSON, the pattern or the grammar
    field: str  # of the request, as errors name it


class Sampling(Struct, frozen=True, kw_only=True):
    """How the next token is picked, and what is told of it. The defaults are neutral; temperature 0 is greedy."""

    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0  # always set once a request is admitted
    logit_bias: dict[int, float] = {}  # of a token id: what is added to its logit; -infinity: it is never picked
    top_logprobs: int | None = None  # None: no log probabilities; else of how many tokens beside the picked one
    constraint: Constraint | None = None


class ChatMessage(Struct, frozen=True):
    role: str
    content: str


class GenerationRequest(Struct, frozen=True, kw_only=True):
    """What any dialect is parsed into. `seed` None: a fresh one is drawn at admission."""

    model_id: ModelId
    messages: tuple[ChatMessage, ...]
    sampling: Sampling = Sampling()
    seed: int | None = None
    token_count_max: int | None = None  # None: as far as the context reaches
    stop: tuple[str, ...] = ()
    without_end: bool = False  # the model may not end its turn: all tokens that were asked for come
    account: str = ""  # whose request it is: the id of an API key; empty: of whoever needs none


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt's: an earlier request had left them in the KV cache


class Timings(Struct, frozen=True):
    """In milliseconds; measured at the head, or here where several heads gave the answer, or a stop string ended it."""

    queued_ms: float
    prefill_ms: float
    decode_ms: float


class GenerationStarted(Struct, frozen=True, tag=True):
    request_id: RequestId
    prompt_tokens: int
    seed: int


class QueueProgressed(Struct, frozen=True, tag=True):
    """It waits for other requests; told again whenever that changes."""

    position: int  # 1: the next
    waiting_requests: int  # itself included


class PrefillProgressed(Struct, frozen=True, tag=True):
    processed_tokens: int
    total_tokens: int


class LikelyToken(Struct, frozen=True):
    """A token, what it adds to a text (of markup: its name, and no bytes), and its log probability."""

    token_id: int
    text: str
    text_bytes: tuple[int, ...]
    logprob: float


class PickedToken(LikelyToken, frozen=True):
    likeliest: tuple[LikelyToken, ...] = ()  # for its place, the best first


class TextGenerated(Struct, frozen=True, tag=True, omit_defaults=True):
    """New text; `token_ids` are the tokens that it came from (text may wait for a whole character)."""

    text: str
    token_ids: tuple[int, ...]
    picked: tuple[PickedToken, ...] = ()  # one for each of `token_ids`, if log probabilities were asked for


class GenerationFinished(Struct, frozen=True, tag=True):
    reason: FinishReason
    usage: Usage
    timings: Timings


class GenerationFailed(Struct, frozen=True, tag=True):
    """The last event of a request that could not go on. `status` is the HTTP status that fits."""

    message: str
    status: int = 500
    retry_after_s: int = 0  # when to try again; 0: not known
    param: str | None = None  # the field of the request that is wrong, if one is


GenerationEvent = (
    GenerationStarted | QueueProgressed | PrefillProgressed | TextGenerated | GenerationFinished | GenerationFailed
)


# ---- between serving and the head ----


class ServeHello(Struct, frozen=True, tag=True):
    """The first frame of a connection from serving."""

    instance_id: str
    can_prove_alive: bool = False  # older nodes can't, and are not asked to


class Admit(Struct, frozen=True, tag=True, kw_only=True):
    """Run this. `token_ids` is the prompt, and after a broken attempt also what was generated:
    `token_ids[prompt_length:]`.
    """

    request_id: RequestId
    attempt: int
    token_ids: tuple[int, ...]
    prompt_length: int
    sampling: Sampling
    token_count_max: int  # new tokens, counted from `prompt_length`
    stop_token_ids: tuple[int, ...]
    account: str = ""  # whose it is: slots are shared out fairly between accounts


class Cancel(Struct, frozen=True, tag=True):
    request_id: RequestId
    attempt: int


class Alive(Struct, frozen=True, tag=True):
    """Whoever reads what the head says is there."""


ServeCommand = Admit | Cancel
ServeMessage = ServeCommand | Alive


class ProveAlive(Struct, frozen=True, tag=True):
    """From the head, once: say `Alive` so often, or the connection is taken for dead."""

    every_ms: int


class Queued(Struct, frozen=True, tag=True):
    """Waits for a KV slot, `position` requests before it, `waiting_requests` in all (0: an older head does not say)."""

    request_id: RequestId
    attempt: int
    position: int
    waiting_requests: int = 0


class Prefilled(Struct, frozen=True, tag=True):
    """So far is the prompt processed. `cached_tokens` of the processed ones were in the KV cache already."""

    request_id: RequestId
    attempt: int
    processed_tokens: int
    total_tokens: int
    cached_tokens: int


class Likelihood(Struct, frozen=True, array_like=True):
    """Log probabilities by the model's logits, before anything was done to them."""

    logprob: float  # of the picked token
    likeliest: tuple[tuple[int, float], ...] = ()  # token ids and theirs, the best first


class TokenSampled(Struct, frozen=True, tag=True, omit_defaults=True):
    """`position` is the token's index in the whole sequence, prompt included. Stop tokens are not sent."""

    request_id: RequestId
    attempt: int
    position: int
    token_id: int
    likelihood: Likelihood | None = None  # if it was asked for


class Ended(Struct, frozen=True, tag=True):
    request_id: RequestId
    attempt: int
    reason: FinishReason
    completion_tokens: int  # includes a stop token
    timings: Timings


class Broken(Struct, frozen=True, tag=True):
    """The request can't go on (refused, or a stage is lost). `status` is the HTTP status that fits."""

    request_id: RequestId
    attempt: int
    message: str
    status: int
    retry_after_s: int = 0  # 0: not known


HeadEvent = Queued | Prefilled | TokenSampled | Ended | Broken
HeadMessage = HeadEvent | ProveAlive
