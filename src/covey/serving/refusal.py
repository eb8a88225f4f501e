"""How anything in this room says that a request can't be served: it becomes the request's `GenerationFailed`."""

from typing import Final

MESSAGES: Final = "messages"  # the field of all requests that the prompt is made of


class RefusedError(Exception):
    """`message` is one sentence for a person; `status` is the HTTP status that fits; `param` names the field of the
    request that is wrong, if one is.
    """

    def __init__(self, message: str, status: int, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
