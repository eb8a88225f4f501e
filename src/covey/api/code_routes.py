"""The route that changes the cluster's join code. No join code goes through it, neither in nor out: whoever asks proves
to hold the present one, and reads the new one where the node keeps it.
"""

from fastapi import Request, Response
from pydantic import Field

from covey.api.answers import BodyReader, json_response
from covey.api.backend import Backend
from covey.api.body import DialectBody, fields, json_object
from covey.schema.ids import NodeId

NODES_MAX = 1024


class RotateBody(DialectBody):
    proof: str
    without: list[str] = Field(default_factory=list, max_length=NODES_MAX)  # ids of nodes that get no new code


class CodeRoutes:
    def __init__(self, backend: Backend, bodies: BodyReader) -> None:
        self._backend = backend
        self._bodies = bodies

    async def rotate(self, request: Request) -> Response:
        """Answers when the nodes that stay have the new code, or after a few seconds."""
        asked = fields(RotateBody, json_object(await self._bodies.read(request)))
        outcome = await self._backend.rotate_code(asked.proof, [NodeId(node_id) for node_id in asked.without])
        return json_response(outcome)
