"""The routes that add, list and revoke API keys; for whoever sits at this node's machine."""

import secrets
import time

from fastapi import Request, Response

from covey.api import auth, cluster_commands
from covey.api.answers import NO_STORE, BodyReader, json_response
from covey.api.backend import Backend
from covey.api.errors import RequestError
from covey.api.guard import LOCAL
from covey.schema.cluster import AddKey, RevokeKey


class KeyRoutes:
    def __init__(self, backend: Backend, bodies: BodyReader) -> None:
        self._backend = backend
        self._bodies = bodies

    async def add(self, request: Request) -> Response:
        """Makes a key and shows it: this once and never again."""
        refuse_others(request)
        name = auth.parse_key(await self._bodies.read(request))
        key, shown = auth.made(name, secrets.token_bytes(auth.ENTROPY_BYTES), int(time.time()))
        result = await self._backend.submit(AddKey(key))
        cluster_commands.accepted(result.outcome)
        return json_response({**auth.render_key(key), "key": shown}, 201, NO_STORE)

    async def list(self, request: Request) -> Response:
        """The valid keys, by name."""
        refuse_others(request)
        keys = sorted(self._backend.keys(), key=lambda each: (each.name, each.key_id))
        return json_response({"keys": [auth.render_key(key) for key in keys]}, headers=NO_STORE)

    async def revoke(self, request: Request) -> Response:
        """Ends a key, by its id or name."""
        refuse_others(request)
        result = await self._backend.submit(RevokeKey(request.path_params["key"]))
        return json_response({"key_id": cluster_commands.accepted(result.outcome).effect_id})


def refuse_others(request: Request) -> None:
    """Raises `RequestError` 403: a key lets in, it does not let others in."""
    if not request.scope.get(LOCAL):
        sentence = "API keys are managed on the node's own machine only: run `covey keys` there."
        raise RequestError(sentence, status=403)
