"""The requests that wait for a KV slot of an instance: so many and no more, and fair between accounts. Pure.

Those that wait at a node for a model which is not ready are kept by the same rules.

An account is whoever asked: the holder of an API key. Who sends much waits behind what it sent itself, and holds up
nobody else. How long is told to who can't wait here any more.
"""

import heapq
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import chain
from math import ceil
from typing import Final, Generic, Protocol, TypeVar

QUEUE_MAX: Final = 64  # requests; who comes after so many would wait for minutes and is better told so
TURNS_MAX: Final = 1024  # accounts whose last turn is remembered; a cluster has at most 256 keys at a time
LATELY: Final = 32  # requests whose slots tell how fast slots come free
RETRY_SECONDS_MAX: Final = 60  # OpenAI's clients take no notice of a longer `Retry-After`


class Waits(Protocol):
    """One that waits. `has_begun`: its client has read a part of its answer."""

    @property
    def key(self) -> Hashable: ...

    @property
    def account(self) -> str: ...

    @property
    def has_begun(self) -> bool: ...


Waiter = TypeVar("Waiter", bound=Waits)


class Waiting(Generic[Waiter]):
    """The next is of the account that runs the fewest requests; of several, of the one whose last turn is the longest
    ago, so that they take turns; of one account, the one that came first.
    """

    def __init__(self) -> None:
        self._lines: dict[str, dict[Hashable, Waiter]] = {}  # of each account that waits, in the order of coming
        self._turns: dict[str, int] = {}  # when each account last got a slot, that of the oldest turn first
        self._turn = 0

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __contains__(self, key: Hashable) -> bool:
        return any(key in line for line in self._lines.values())

    def __iter__(self) -> Iterator[Waiter]:
        return chain.from_iterable(line.values() for line in self._lines.values())

    def enter(self, request: Waiter) -> Waiter | None:
        """Takes `request` in. Returns who can't stay: nobody, `request` itself, or the newest of another account.

        Where the queue is full, the account that waits with the most gives up its newest, but only to one that then
        still waits with fewer. So nobody is kept out by what one other sent, each displacement makes the shares more
        even (two accounts can't displace one another in turn), and whoever waits with its fair share or less is never
        displaced, so it comes to its turn.

        An answer that has begun, and comes from a head that was lost, is the first of its account, and stays whatever
        else waits: its client has read a part of it.
        """
        account = request.account
        if request.has_begun:
            self._lines[account] = {request.key: request, **self._lines.get(account, {})}
            return None
        displaced = None
        if len(self) >= QUEUE_MAX:
            largest = max(self._lines.values(), key=len)
            displaced = next((each for each in reversed(largest.values()) if not each.has_begun), None)
            if displaced is None or len(self._lines.get(account, ())) + 1 >= len(largest):
                return request
            self.leave(displaced)
        self._lines.setdefault(account, {})[request.key] = request
        return displaced

    def leave(self, request: Waiter) -> None:
        """One that does not wait is not missed."""
        line = self._lines.get(request.account, {})
        if line.pop(request.key, None) and not line:
            del self._lines[request.account]

    def take_turn(self, request: Waiter) -> None:
        """It gets a slot, whether it has waited for it or not."""
        self.leave(request)
        self._turn += 1
        self._turns.pop(request.account, None)
        self._turns[request.account] = self._turn
        if len(self._turns) > TURNS_MAX:
            del self._turns[next(iter(self._turns))]

    def in_order(self, running: Mapping[str, int]) -> Iterator[Waiter]:
        """Who is next, and next after that, if slots came free and nobody else came. `running`: of each account."""
        lines = [(account, iter(line.values())) for account, line in self._lines.items()]
        order = [
            (running.get(account, 0), self._turns.get(account, 0), index) for index, (account, _) in enumerate(lines)
        ]
        heapq.heapify(order)
        turn = self._turn
        while order:
            count, _, index = order[0]
            request = next(lines[index][1], None)
            if request is None:
                heapq.heappop(order)
                continue
            turn += 1
            heapq.heapreplace(order, (count + 1, turn, index))
            yield request


def full(state: str, *, made_room: bool) -> str:
    """Why one can't wait any more, after what is wrong with the model; `made_room`: for another account's."""
    reason = f"{state}: {QUEUE_MAX} requests are waiting for it"
    if made_room:
        reason += ", more of yours than of anybody else's, so this one made room for another's"
    return reason


class Pace:
    """How fast slots come free, by how long those who had one lately held it."""

    def __init__(self, slot_count: int) -> None:
        self._slot_count = slot_count
        self._held_seconds: deque[float] = deque(maxlen=LATELY)

    def note(self, seconds: float) -> None:
        """A slot came free after `seconds`."""
        self._held_seconds.append(seconds)

    def retry_after_seconds(self, waiting_count: int, held_seconds: Iterable[float]) -> int:
        """About when all that wait now will have begun: at least 1, at most `RETRY_SECONDS_MAX`.

        `held_seconds`: of the slots that are taken now; all there is to go by until the first comes free.
        """
        known = [*self._held_seconds] or [*held_seconds]
        usual = sum(known) / len(known) if known else 0.0
        return min(max(ceil(usual * waiting_count / self._slot_count), 1), RETRY_SECONDS_MAX)
