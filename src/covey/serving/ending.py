"""Waits that end together: as soon as it is told why, each of them raises that."""

from collections.abc import Generator
from contextlib import contextmanager

import anyio

from covey.serving.refusal import RefusedError


class Ending:
    """What is awaited within `ends_waits` is cancelled by `tell`, whoever waits for it, now or later."""

    def __init__(self) -> None:
        self._reason: tuple[str, int] | None = None
        self._waits: set[anyio.CancelScope] = set()

    def tell(self, message: str, status: int) -> None:
        """What all waits raise from now on: a `RefusedError`. The first that is told stays."""
        self._reason = self._reason or (message, status)
        for wait in self._waits:
            wait.cancel()

    @contextmanager
    def ends_waits(self) -> Generator[None]:
        """Raises `RefusedError`. A generator must not yield within."""
        self._check()
        with anyio.CancelScope() as wait:
            self._waits.add(wait)
            try:
                yield
            finally:
                self._waits.remove(wait)
        if wait.cancelled_caught:
            self._check()

    def _check(self) -> None:
        if self._reason is not None:
            raise RefusedError(*self._reason)
