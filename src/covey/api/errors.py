"""The one error that parsing and answering raise, and the one envelope in which clients see errors."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any


class RequestError(Exception):
    """The request can't be served as it was sent.

    `message` says what is wrong and what to do; `param` names the guilty field, if one is. `retry_after_s` is sent as
    `Retry-After` where trying again later helps; `headers` go with the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.retry_after_s = retry_after_s
        self.headers = headers or {}


def render_error(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """The envelope of every error that this API answers with."""
    return {"error": {"message": message, "type": HTTPStatus(status).phrase, "param": param, "code": status}}


def sentence(reason: str) -> str:
    """`reason` with a capital at its beginning and a stop at its end.

    Inside of the cluster a reason is what may follow "was refused:". A name at the beginning stays as it is: words are
    lower-case letters only, and names of models and files have more to them.
    """
    opening = reason.partition(" ")[0]
    whole = reason[:1].upper() + reason[1:] if opening.isalpha() and opening.islower() else reason
    return whole if whole.endswith((".", "!", "?")) else f"{whole}."
