"""What waits for the control machine: one bounded queue.

Nothing is lost silently. Whoever may wait puts an input in and waits for room. What may be lost anyway (messages of
other nodes, progress) is offered: when the queue is full it is dropped, and the log says so once per flood.
"""

import logging
from typing import Final

import anyio

from covey.schema.machine import Input

INPUTS_MAX: Final = 4096  # the busiest clusters bring some hundred a second, and the machine takes under 1 ms each

_log = logging.getLogger(__name__)


class Mailbox:
    """Belongs to the event loop, and to no other thread."""

    def __init__(self, inputs_max: int = INPUTS_MAX) -> None:
        self._sender, self._receiver = anyio.create_memory_object_stream[Input](inputs_max)
        self._is_flooded = False
        self.dropped_count = 0

    async def put(self, item: Input) -> None:
        """Waits for room."""
        await self._sender.send(item)

    def offer(self, item: Input) -> bool:
        """False when there was no room, and the input is lost."""
        try:
            self._sender.send_nowait(item)
        except anyio.WouldBlock:
            self._drop()
            return False
        self._is_flooded = False
        return True

    async def take(self, wait_s: float | None) -> Input | None:
        """The oldest input; None if there is none within `wait_s`."""
        with anyio.move_on_after(wait_s):
            return await self._receiver.receive()
        return None

    def close(self) -> None:
        self._sender.close()
        self._receiver.close()

    def _drop(self) -> None:
        self.dropped_count += 1
        if not self._is_flooded:
            self._is_flooded = True
            _log.warning("messages arrive faster than this node can take them; some are dropped")
