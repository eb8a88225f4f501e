"""The route that changes the cluster's join code. No join code goes through it, neither in nor out: whoever asks proves
to hold the present one, and reads the new one where the node keeps it.
"""

from collections.abc import Awaitable, Callable

import msgspec
from fastapi import Request, Response
from pydantic import Field

from covey.api.backend import Backend
from covey.api.body import DialectBody, fields, json_object
from covey.schema.ids import NodeId

NODES_MAX = 1024


class RotateBody(DialectBody):
    proof: str
    without: list[str] = Field(default_factory=list, max_length=NODES_MAX)  # ids of nodes that get no new code


class CodeRoutes:
    """`read` gives a request's body. Raises `RequestError`."""

    def __init__(self, backend: Backend, read: Callable[[Request], Awaitable[bytes]]) -> None:
        self._backend = backend
        self._read = read

    async def rotate(self, request: Request) -> Response:
        """Answers when the nodes that stay have the new code, or after a few seconds."""
        asked = fields(RotateBody, json_object(await self._read(request)))
        outcome = await self._backend.rotate_code(asked.proof, [NodeId(node_id) for node_id in asked.without])
        return Response(msgspec.json.encode(outcome), media_type="application/json")
