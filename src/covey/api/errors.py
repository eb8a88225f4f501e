"""The one error that parsing and answering raise, and the one envelope in which clients see errors."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

TOO_MANY: Final = 429
OUR_FAULT: Final = 500  # from here on
CODES: Final = {401: "invalid_api_key", TOO_MANY: "rate_limit_exceeded"}
MODEL_NOT_FOUND: Final = "model_not_found"


class RequestError(Exception):
    """The request can't be served as it was sent.

    `message` says what is wrong and what to do; `param` names the guilty field, if one is; `code` is OpenAI's word for
    it, if there is one. `retry_after_s` is sent as `Retry-After` where trying again later helps; `headers` go with the
    answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        self.headers = headers or {}


def about_model(error: RequestError) -> RequestError:
    """The same, about the model that was named: clients of OpenAI tell by its code that it is not there."""
    code = MODEL_NOT_FOUND if error.status == HTTPStatus.NOT_FOUND else error.code
    param = "model" if code == MODEL_NOT_FOUND else error.param
    return RequestError(
        error.message,
        status=error.status,
        param=param,
        code=code,
        retry_after_s=error.retry_after_s,
        headers=error.headers,
    )


def render_error(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The envelope of every error that this API answers with: OpenAI's, and the HTTP status for streams that broke.

    OpenAI's typed clients take a string or null as `code`. exo has the status there; its clients read the message.
    """
    error = {"message": message, "type": _type_of(status), "param": param, "code": code or CODES.get(status)}
    return {"error": {**error, "status": int(status)}}


def _type_of(status: int) -> str:
    if status == TOO_MANY:
        return "rate_limit_error"
    return "server_error" if status >= OUR_FAULT else "invalid_request_error"


def sentence(reason: str) -> str:
    """`reason` with a capital at its beginning and a stop at its end.

    Inside of the cluster a reason is what may follow "was refused:". A name at the beginning stays as it is: words are
    lower-case letters only, and names of models and files have more to them.
    """
    opening = reason.partition(" ")[0]
    whole = reason[:1].upper() + reason[1:] if opening.isalpha() and opening.islower() else reason
    return whole if whole.endswith((".", "!", "?")) else f"{whole}."
