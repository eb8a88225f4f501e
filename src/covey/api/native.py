"""Covey's own dialect, for its own clients: the schema's messages as JSON. Pure.

`POST /generate` takes the fields of OpenAI's chat that we honour (always streamed) and answers with one server-sent
event for each `GenerationEvent`, whose `type` is the name of the message:

    {"type": "GenerationStarted", "request_id", "prompt_tokens", "seed"}
    {"type": "PrefillProgressed", "processed_tokens", "total_tokens"}
    {"type": "TextGenerated", "text", "token_ids"}      and "picked", if log probabilities were asked for
    {"type": "GenerationFinished", "reason", "usage", "timings"}      or
    {"type": "GenerationFailed", "message", "status", "retry_after_s", "param"} as the last one

but for `QueueProgressed`, which is a comment as in the other dialects (older clients know no such event).

`GET /cluster` is the `ClusterState`; `GET /cluster/stream` is that first (event `state`), then each `ClusterChange`
(event `change`), with ids after which it can go on.
"""

from covey.api import sse
from covey.api.body import fields, json_object
from covey.api.cluster_changes import ClusterChange
from covey.api.errors import RequestError
from covey.api.generation_body import GenerationBody
from covey.schema.cluster import ClusterState
from covey.schema.generation import GenerationEvent, GenerationFailed, GenerationRequest, QueueProgressed


def parse_generate(body: bytes) -> GenerationRequest:
    """`model_id` is the name as it was sent. Raises `RequestError`."""
    asked = fields(GenerationBody, json_object(body))
    return asked.request(asked.max_tokens)


def render_event(event: GenerationEvent) -> bytes:
    if isinstance(event, QueueProgressed):
        return sse.queued(event.position, event.waiting_requests)
    return sse.data(event)


def render_failure(error: RequestError) -> bytes:
    """What ends a stream that breaks by itself."""
    return render_event(GenerationFailed(error.message, error.status))


def render_change(event_id: str, event: ClusterState | ClusterChange) -> bytes:
    name = b"state" if isinstance(event, ClusterState) else b"change"
    return b"event: " + name + b"\nid: " + event_id.encode() + b"\n" + sse.data(event)
