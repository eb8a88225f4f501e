"""Ranks of one stage within a test: threads, and exchanges between them."""

import queue
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from covey.engine.contract import Exchange
from covey.engine.exchange import ChannelExchange
from covey.engine.tls import Channel
from tests.engine.harness import channel_pair

Result = TypeVar("Result")
WAIT_SECONDS: Final = 60


class MemoryExchange:
    """The dumb twin of the real one: each rank hands all others a copy."""

    def __init__(self, rank: int, boxes: Sequence[Sequence[queue.Queue[Any]]]) -> None:
        """`boxes`: of each receiver, of each sender."""
        self.rank = rank
        self.count = len(boxes)
        self._boxes = boxes

    def add_up(self, values: NDArray[np.float32]) -> None:
        for box in self._boxes:
            box[self.rank].put(values.copy())
        parts = [box.get(timeout=WAIT_SECONDS) for box in self._boxes[self.rank]]
        assert {part.shape for part in parts} == {values.shape}
        values[:] = parts[0]
        for part in parts[1:]:
            values += part

    def join(self, values: NDArray[np.float32]) -> NDArray[np.float32] | None:
        self._boxes[0][self.rank].put(values.copy())
        if self.rank:
            return None
        return np.concatenate([box.get(timeout=WAIT_SECONDS) for box in self._boxes[0]], axis=1)


@contextmanager
def memory_exchanges(count: int) -> Iterator[list[Exchange]]:
    boxes: list[list[queue.Queue[Any]]] = [[queue.Queue() for _ in range(count)] for _ in range(count)]
    yield [MemoryExchange(rank, boxes) for rank in range(count)]


@contextmanager
def channel_exchanges(count: int) -> Iterator[list[ChannelExchange]]:
    """Real ones, over loopback."""
    channels: list[dict[int, Channel]] = [{} for _ in range(count)]
    for low in range(count):
        for high in range(low + 1, count):
            channels[low][high], channels[high][low] = channel_pair(*_connected())
    exchanges = [ChannelExchange(rank, channels[rank]) for rank in range(count)]
    try:
        yield exchanges
    finally:
        for exchange in exchanges:
            exchange.close()


def _connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        return near, server.accept()[0]


def side_by_side(exchanges: Sequence[Exchange], act: Callable[[Any], Result]) -> list[Result]:
    """What `act` returns for each rank; all run at once. Raises what the first of them raised."""
    with ThreadPoolExecutor(len(exchanges)) as pool:
        return [future.result(WAIT_SECONDS) for future in [pool.submit(act, each) for each in exchanges]]


def in_thread(act: Callable[[], Any]) -> "queue.Queue[Any]":
    """Runs it apart; the queue gets its result, or its exception."""
    outcome: queue.Queue[Any] = queue.Queue()

    def run() -> None:
        try:
            outcome.put(act())
        except Exception as error:  # noqa: BLE001 - the test looks at it
            outcome.put(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome
