"""The one error that parsing and answering raise: a sentence for a person, and the HTTP status that fits."""


class RequestError(Exception):
    """The request can't be served as it was sent.

    `message` says what is wrong and what to do; `param` names the guilty field, if one is. `retry_after_s` is sent as
    `Retry-After` where trying again later helps.
    """

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.retry_after_s = retry_after_s
