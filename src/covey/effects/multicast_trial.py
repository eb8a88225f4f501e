"""Whether multicast works here, tried: a few bytes of our own to a group, and what comes back of them.

They are no beacon and nothing that Zenoh understands, so that nodes which hear them go on as before.
"""

import secrets
import select
import socket
import time
from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from covey.effects import beacon, multicast
from covey.effects.interfaces import Place
from covey.schema.mesh import BEACON_BYTES_MAX, Beacon

SENT_AFTER_S: Final = (0.0, 0.5, 1.0)  # since the start; a single one may be lost
HEARD_MAX: Final = 1000  # datagrams; what is more is a flood


class Groups(Struct, frozen=True):
    """`version_6` is empty where there is none."""

    version_4: str
    version_6: str
    port: int


class Trial(Struct, frozen=True):
    """`lost`: by interface, why; empty where it was sent and did not come back. `tried`: the others, too.

    `heard`: the beacons of nodes, each with the address that it came from.
    """

    tried: tuple[Place, ...]
    lost: dict[Place, str]
    heard: tuple[tuple[Beacon, str], ...] = ()


def beacon_groups() -> Groups:
    """The group of the beacons, which nodes of all clusters and versions have in common."""
    return Groups(beacon.GROUP_4, beacon.GROUP_6, beacon.PORT)


def attempt(places: Sequence[Place], groups: Groups, seconds: float, *, until_back: bool = False) -> Trial:
    """Sends from each place, and listens for so long, or until all has come back if that is enough."""
    running = _Attempt([place for place in places if groups.version_6 or ":" not in place[1]], groups)
    try:
        running.run(seconds, until_back=until_back)
    finally:
        running.close()
    return Trial(tuple(running.places), running.lost, tuple(running.heard))


class _Attempt:
    def __init__(self, places: Sequence[Place], groups: Groups) -> None:
        self.places = places
        self.lost: dict[Place, str] = dict.fromkeys(places, "")
        self.heard: list[tuple[Beacon, str]] = []
        self._groups = groups
        self._mark = b"covey doctor " + secrets.token_hex(8).encode() + b" "
        self._senders: dict[Place, socket.socket] = {}
        self._receivers: dict[str, socket.socket] = {}
        for place in places:
            try:
                self._open(place)
            except OSError as error:
                self.lost[place] = error.strerror or str(error)

    def _open(self, place: Place) -> None:
        group = self._group(place)
        if group not in self._receivers:
            self._receivers[group] = multicast.receiver(group, self._groups.port)
        multicast.join(self._receivers[group], group, *place)
        self._senders[place] = multicast.sender(*place)

    def _group(self, place: Place) -> str:
        return self._groups.version_6 if ":" in place[1] else self._groups.version_4

    def run(self, seconds: float, *, until_back: bool) -> None:
        start_s = time.monotonic()
        due = list(SENT_AFTER_S)
        for _ in range(HEARD_MAX):
            passed_s = time.monotonic() - start_s
            if passed_s >= seconds or (until_back and not self.lost):
                return
            if due and passed_s >= due[0]:
                due.pop(0)
                self._send()
            wait_s = max(0.0, min(due[0] if due else seconds, seconds) - passed_s)
            for ready in select.select(list(self._receivers.values()), [], [], wait_s)[0]:
                self._read(ready)

    def _send(self) -> None:
        for number, (place, sender) in enumerate(self._senders.items()):
            try:
                sender.sendto(self._mark + str(number).encode(), (self._group(place), self._groups.port))
            except OSError as error:
                self.lost[place] = error.strerror or str(error)

    def _read(self, ready: socket.socket) -> None:
        try:
            data, origin = ready.recvfrom(BEACON_BYTES_MAX + 1)
        except OSError:  # the interface went away; what it means shows by what does not come back
            return
        number = data.removeprefix(self._mark)
        if data.startswith(self._mark) and number.isdigit() and int(number) < len(self._senders):
            self.lost.pop(list(self._senders)[int(number)], None)
        elif (found := beacon.parse(data)) is not None:
            self.heard.append((found, str(origin[0]).partition("%")[0]))

    def close(self) -> None:
        for each in (*self._senders.values(), *self._receivers.values()):
            each.close()
