"""How a runner comes to all its links, once it was told where its neighbours are."""

import ssl
import threading
import time
from collections.abc import Sequence

from covey.engine.greeting import Neighbour, Purpose, other_rank, stage_after, stage_before
from covey.engine.handshake import Dialler
from covey.engine.link import Link, LinkBrokenError
from covey.engine.link_place import LinkPlace
from covey.engine.mailbox import Linked
from covey.engine.port import Reception
from covey.schema.runner import Address, ConnectTo, RunnerSpec


class Linking:
    """For one generation; `reception` takes what others open."""

    def __init__(self, spec: RunnerSpec, neighbours: ConnectTo, reception: Reception, context: ssl.SSLContext) -> None:
        self._spec = spec
        self._told = neighbours
        self._reception = reception
        self._dialler = Dialler(context)
        self._seconds = spec.connect_ms / 1000
        self._deadline = time.monotonic() + self._seconds

    def link(self) -> Linked:
        """Opens those that are its to open, and waits for the others, which it offers where nobody comes. Raises
        `LinkRefusedError`, `LinkBrokenError`, `LinkClosedError`.
        """
        spec, reception = self._spec, self._reception
        below, above = range(spec.rank), range(spec.rank + 1, spec.rank_count)
        is_leader, has_stages = spec.rank == 0, spec.stage_count > 1
        for rank in below:
            self._offer(self._other(rank, Purpose.SUMS), reception.sums[rank])
        if not is_leader:
            self._offer(self._other(0, Purpose.STEPS), reception.before)
        elif has_stages:
            self._offer(stage_before(spec, self._told.stage_before), reception.before)
        after = None
        if has_stages and is_leader:
            after = self._open(stage_after(spec, self._told.next_stage), reception.after)
        steps = [self._open(self._other(rank, Purpose.STEPS), reception.steps[rank]) for rank in above if is_leader]
        sums = {rank: self._open(self._other(rank, Purpose.SUMS), reception.sums[rank]) for rank in above}
        sums |= {rank: self._await(reception.sums[rank], f"Rank {rank}") for rank in below}
        before = None
        if has_stages or not is_leader:
            before = self._await(reception.before, "The stage before" if is_leader else "Rank 0")
        return Linked(before, after, tuple(steps), sums)

    def _other(self, rank: int, purpose: Purpose) -> Neighbour:
        return other_rank(self._spec, rank, purpose, self._addresses(rank))

    def _addresses(self, rank: int) -> Sequence[Address]:
        return self._told.ranks[rank] if rank < len(self._told.ranks) else ()

    def _offer(self, neighbour: Neighbour, place: LinkPlace) -> None:
        arguments = (neighbour, place, self._seconds)
        threading.Thread(target=self._dialler.offer, args=arguments, name="offer", daemon=True).start()

    def _open(self, neighbour: Neighbour, place: LinkPlace) -> Link:
        return self._dialler.connect(neighbour, place, self._deadline - time.monotonic())

    def _await(self, place: LinkPlace, name: str) -> Link:
        link = place.wait(self._deadline - time.monotonic())
        if link is None:
            raise LinkBrokenError(f"{name} opened no link within {self._seconds:.0f} s.")
        return link
