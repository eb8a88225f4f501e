"""The sums between the ranks of a stage: right, the same at all of them, and never waited for in vain."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import pytest

from covey.engine.contract import ALONE, Exchange
from covey.engine.exchange import DIRECT_BYTES_MAX, OPENING, ChannelExchange
from covey.engine.link import LinkBrokenError
from tests.engine.ranks import channel_exchanges, in_thread, memory_exchanges, side_by_side

COUNTS = (2, 3, 4)
KINDS = (memory_exchanges, channel_exchanges)
Make = Callable[[int], AbstractContextManager[Sequence[Exchange]]]


def own_values(rank: int, rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(rank).standard_normal((rows, columns), np.float32)


def expected_sum(count: int, rows: int, columns: int) -> np.ndarray:
    total = own_values(0, rows, columns)
    for rank in range(1, count):
        total = total + own_values(rank, rows, columns)
    return total


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("count", COUNTS)
def test_all_ranks_get_the_same_sum(make: Make, count: int) -> None:
    """Small ones go straight out, large ones while both sides read; in any order."""
    shapes = [(1, 8), (1, 2048), (700, 512), (1, 8), (3, DIRECT_BYTES_MAX // 12), (2000, 600), (0, 5)]

    def add_up(exchange: Exchange) -> list[np.ndarray]:
        values = [own_values(exchange.rank, *shape) for shape in shapes]
        for each in values:
            exchange.add_up(each)
        return values

    with make(count) as exchanges:
        sums = side_by_side(exchanges, add_up)
    for found in sums:
        for shape, values in zip(shapes, found, strict=True):
            assert (values == expected_sum(count, *shape)).all()


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("count", COUNTS)
def test_columns_of_different_widths_come_together_at_rank_0(make: Make, count: int) -> None:
    def join(exchange: Exchange) -> list[np.ndarray | None]:
        found = [exchange.join(own_values(exchange.rank, rows, 7 + exchange.rank)) for rows in (1, 4, 3000)]
        exchange.add_up(own_values(exchange.rank, 1, 1))
        return found

    with make(count) as exchanges:
        first, *others = side_by_side(exchanges, join)
    for rows, values in zip((1, 4, 3000), first, strict=True):
        assert values is not None
        assert (values == np.concatenate([own_values(rank, rows, 7 + rank) for rank in range(count)], axis=1)).all()
    assert others == [[None] * 3] * (count - 1)


def test_alone_there_is_nothing_to_do() -> None:
    values = own_values(0, 2, 3)
    ALONE.add_up(values)
    assert (values == own_values(0, 2, 3)).all()
    assert ALONE.join(values) is values
    assert (ALONE.rank, ALONE.count) == (0, 1)


@pytest.mark.parametrize("rows", [1, 4000])
def test_who_waits_is_woken_when_it_is_closed(rows: int) -> None:
    with channel_exchanges(3) as exchanges:
        outcome = in_thread(lambda: exchanges[1].add_up(own_values(1, rows, 1024)))
        time.sleep(0.2)
        assert outcome.empty()
        exchanges[1].close()
        error = outcome.get(timeout=5)
        assert isinstance(error, LinkBrokenError)
        assert "closed here" in str(error)
        with pytest.raises(LinkBrokenError):
            exchanges[1].add_up(own_values(1, 1, 8))


@pytest.mark.parametrize("rows", [1, 4000])
def test_a_rank_that_goes_away_is_noticed_by_all(rows: int) -> None:
    with channel_exchanges(3) as exchanges:
        waiting = [
            in_thread(lambda exchange=exchange: exchange.add_up(own_values(0, rows, 1024)))
            for exchange in (exchanges[0], exchanges[2])
        ]
        exchanges[1].close()
        for outcome in waiting:
            error = outcome.get(timeout=5)
            assert isinstance(error, LinkBrokenError)
            assert "of this stage" in str(error)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda exchange: exchange.add_up(own_values(0, 1, 8)), lambda exchange: exchange.add_up(own_values(0, 2, 8))),
        (lambda exchange: exchange.add_up(own_values(0, 2, 8)), lambda exchange: exchange.add_up(own_values(0, 1, 16))),
        (lambda exchange: exchange.join(own_values(0, 1, 8)), lambda exchange: exchange.add_up(own_values(0, 1, 8))),
        (lambda exchange: exchange.join(own_values(0, 1, 8)), lambda exchange: exchange.join(own_values(0, 2, 8))),
    ],
)
def test_ranks_that_compute_different_steps_are_noticed(
    first: Callable[[ChannelExchange], None], second: Callable[[ChannelExchange], None]
) -> None:
    with channel_exchanges(2) as exchanges:
        outcomes = [in_thread(lambda: first(exchanges[0])), in_thread(lambda: second(exchanges[1]))]
        assert "another step" in str(outcomes[0].get(timeout=5))
        outcomes[1].get(timeout=5)


def test_a_rank_that_left_out_a_sum_is_noticed() -> None:
    with channel_exchanges(2) as exchanges:
        exchanges[1]._number = 7
        waiting = [in_thread(lambda each=each: each.add_up(own_values(0, 1, 8))) for each in exchanges]
        assert {type(outcome.get(timeout=5)) for outcome in waiting} == {LinkBrokenError}


def test_an_absurd_length_is_not_believed() -> None:
    with channel_exchanges(2) as exchanges:
        exchanges[1]._peers[0]._channel.send(OPENING.pack(1, 2, 1, 1 << 31))
        with pytest.raises(LinkBrokenError, match="another step"):
            exchanges[0].join(own_values(0, 1, 8))


def test_a_connection_that_ends_within_a_message_is_noticed() -> None:
    with channel_exchanges(2) as exchanges:
        exchanges[1]._peers[0]._channel.send(OPENING.pack(1, 1, 1, 8) + bytes(10))
        exchanges[1].close()
        with pytest.raises(LinkBrokenError, match="in the middle"):
            exchanges[0].add_up(own_values(0, 1, 8))
