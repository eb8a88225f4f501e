"""Who waits at this node for models that are not ready: of each model so many and no more, and fair between accounts,
as at a head whose slots are taken.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from covey.engine.waiting import Waiting, full
from covey.schema.ids import ModelId
from covey.serving.ending import Ending

TOO_MANY: Final = 429  # HTTP


class Waiter(Ending):
    """One request. What it waits for ends when it has to make room for another's."""

    def __init__(self, account: str, *, has_begun: bool) -> None:
        super().__init__()
        self.key = object()
        self.account = account
        self.has_begun = has_begun


class Lines:
    """One line for each model that is waited for."""

    def __init__(self) -> None:
        self._lines: dict[ModelId, Waiting[Waiter]] = {}

    @contextmanager
    def waiting(self, model_id: ModelId, account: str, *, has_begun: bool = False) -> Generator[Waiter]:
        """In line for as long as this is entered. One that can't stay, be it the newcomer, is told so."""
        waiter = Waiter(account, has_begun=has_begun)
        line = self._lines.setdefault(model_id, Waiting[Waiter]())
        refused = line.enter(waiter)
        if refused is not None:
            reason = full(f"{model_id} is not ready", made_room=refused is not waiter)
            refused.tell(f"{reason}; try again in a while.", TOO_MANY)
        try:
            yield waiter
        finally:
            line.leave(waiter)
            self._lines = {each: others for each, others in self._lines.items() if others}
