"""A device left 500 downloads pending, of models that have no files, and is gone for ever; so are its earlier
identities, since it had a new one after every restart.

Elsewhere the others deleted those downloads up to 19 times a second, for months, fetched their lists of files again,
and no restart helped. Here what was reported of a node dies with it, and what was asked of it ends when a person says
so, once.
"""

from collections import Counter
from datetime import UTC, datetime
from random import Random

import msgspec
import pytest

from covey.api.cluster_state import render_state
from covey.schema.cluster import (
    Accepted,
    ClusterState,
    DownloadReport,
    DownloadState,
    Heartbeat,
    MeshMessage,
    NodeReport,
)
from covey.schema.ids import ModelId
from covey.schema.machine import (
    CancelFetch,
    Effect,
    Input,
    KeepEntries,
    Publish,
    StartFetch,
    StartRunner,
    StopRunner,
)
from simulation.faults import Faults
from simulation.host import Host
from simulation.people import MEGABYTE, card
from simulation.world import World

GIGABYTE = 10**9
PENDING = 500
IDENTITIES = 4  # before the last one
WISHES = 3
DAY_MS = 24 * 3_600_000
ARRIVED_MS = 10  # longer than any message takes
SETTLED_MS = 6_000  # after a restart: seen, led, and its first reports
QUIET_MS = 600_000
DELETED_MS = (4_000, 12_000, 20_000)  # after the device was gone: it is away, lost, and both again after a restart
RESTARTS: dict[str, dict[int, tuple[str, ...]]] = {  # when, after the device was gone, and whose
    "nobody": {},
    "one": {1_000: ("bea",)},
    "both": {1_000: ("ada", "bea")},
    "both when the device is forgotten": {40_000: ("ada", "bea")},
    "one, then both, then both once more": {8_000: ("ada",), 15_000: ("ada", "bea"), 45_000: ("ada", "bea")},
}


class Ghost:
    """An identity of the device: it says what a node says, and there is nothing behind it."""

    def __init__(self, world: World, number: int) -> None:
        self.host = world.add(f"ghost{number}", GIGABYTE)
        self.said_count = 0

    def speak(self) -> None:
        hears = tuple(host.node_id for host in self.host.world.up())
        self._say(Heartbeat(self.host.node_id, 1, self._count(), hears, None, "of something else"))
        self._say(
            NodeReport(
                node_id=self.host.node_id,
                boot=1,
                sequence=self._count(),
                name="attic",
                version="0.1.0",
                api_address=None,
                hardware=None,
                downloads=tuple(pending(number) for number in range(PENDING)),
                runners=(),
            )
        )

    def _count(self) -> int:
        self.said_count += 1
        return self.said_count

    def _say(self, message: MeshMessage) -> None:
        self.host.world.publish(self.host, message)


def pending(number: int) -> DownloadReport:
    """No byte has come, and none ever will."""
    return DownloadReport(
        model_id=ModelId(f"without-files-{number}"),
        state=DownloadState.ONGOING,
        bytes_done=0,
        bytes_total=100 * GIGABYTE,
    )


class House:
    """Two nodes that stay, the device as it was last, and what it was before. `effects`: all that any of them did."""

    def __init__(self) -> None:
        self.world = World(Random(1), Faults(fetch_ms_max=DAY_MS))  # the hub hangs
        self.ada, self.bea, self.attic = (self.world.add(name, 8 * GIGABYTE) for name in ("ada", "bea", "attic"))
        self.ghosts = [Ghost(self.world, number) for number in range(IDENTITIES)]
        self.effects: list[tuple[Host, int, Effect]] = []  # with the boot
        self.world.observer = self._observe
        self._begin()
        self.gone_ms = self.world.now_ms

    def _observe(self, host: Host | None, _: Input | str, effects: list[Effect]) -> None:
        self.effects += [(host, host.boot, effect) for effect in effects if host]

    def _begin(self) -> None:
        """Everybody is there; the device fetches what it can't get; then it is gone."""
        for host in (self.ada, self.bea, self.attic):
            host.start()
        for _ in range(8):
            self.go_on(500)
            for ghost in self.ghosts:
                ghost.speak()
        for number in range(WISHES):
            self.world.people.place(self.ada, card(f"wanted-{number}", 2, MEGABYTE), node_ids=(self.attic.node_id,))
        self.go_on(1_000)
        assert len(self.attic.fetches) == WISHES
        for state in self.states():
            assert sum(len(each.report.downloads) for each in state.members if each.report) >= PENDING * IDENTITIES
        self.attic.crash()

    def go_on(self, duration_ms: int) -> None:
        self.world.run_until(self.world.now_ms + duration_ms)

    def restart(self, names: tuple[str, ...]) -> None:
        hosts = [host for host in self.world.hosts if host.name in names]
        for host in hosts:
            host.crash()
        for host in hosts:
            host.start()

    def delete_one(self) -> None:
        """A person does, at both nodes, since nothing seems to happen."""
        assert self.ada.machine
        instance_id = next(iter(self.ada.machine.cluster.instances))
        for host in (self.ada, self.bea):
            self.world.people.delete(host, instance_id)

    def states(self) -> list[ClusterState]:
        """As the nodes that are up show it."""
        return [host.machine.state(host.now_ms) for host in self.world.up() if host.machine]

    def done(self, kind: type[Effect]) -> list[tuple[str, int, Effect]]:
        return [(host.name, boot, effect) for host, boot, effect in self.effects if isinstance(effect, kind)]

    def expect_idle(self) -> None:
        """Heartbeats, and the reports that come when nothing is new: no other message, no file, no process, no news."""
        settings, before = self.world.settings, len(self.effects)
        self.go_on(QUIET_MS)
        done = Counter(
            (host.name, type(effect.message) if isinstance(effect, Publish) else type(effect))
            for host, _, effect in self.effects[before:]
        )
        for name in ("ada", "bea"):
            assert done.pop((name, Heartbeat)) <= QUIET_MS // settings.heartbeat_ms + 1
            assert done.pop((name, NodeReport)) <= QUIET_MS // settings.report_idle_ms + 1
        assert not done


def expect_clean(house: House) -> None:
    """Of the device nothing is left, in either shape that clients read."""
    for state in house.states():
        assert [each.node_id for each in state.members] == sorted([house.ada.node_id, house.bea.node_id])
        assert state.instances == state.wishes == ()
        shown = msgspec.json.encode((state, render_state(state, {}, datetime.now(UTC)))).decode()
        assert house.ada.node_id in shown
        for gone in (house.attic.node_id, *(ghost.host.node_id for ghost in house.ghosts), "without-files", "wanted"):
            assert gone not in shown


def expect_nothing_twice(house: House) -> None:
    """A wish or an instance is deleted once on each disk; nobody but the device has fetched or run anything."""
    deleted = Counter(
        (name, key)
        for name, _, effect in house.done(KeepEntries)
        if isinstance(effect, KeepEntries)
        for key, entry in effect.entries.items()
        if entry is None or entry.value is None
    )
    assert set(deleted.values()) == {1}
    assert {name for name, _, _ in house.done(StartFetch)} == {"attic"}
    assert len(house.done(StartFetch)) == WISHES
    for kind in (CancelFetch, StartRunner, StopRunner):
        assert not house.done(kind)


@pytest.mark.parametrize("restarted", RESTARTS)
def test_what_a_vanished_device_left_is_over_within_the_grace_period(restarted: str) -> None:
    house = House()
    forgotten_ms = house.world.settings.forgotten_ms
    for when_ms in sorted({*DELETED_MS, *RESTARTS[restarted], forgotten_ms}):
        house.world.run_until(house.gone_ms + when_ms)
        house.restart(RESTARTS[restarted].get(when_ms, ()))
        if when_ms in DELETED_MS:
            house.delete_one()
        if when_ms == forgotten_ms:
            house.go_on(ARRIVED_MS)
            expect_clean(house)
    house.go_on(SETTLED_MS)
    expect_clean(house)
    house.expect_idle()
    expect_clean(house)
    expect_nothing_twice(house)
    assert [type(answer) for answer in house.world.people.answers.values()] == [Accepted] * 3 * WISHES


@pytest.mark.parametrize("restarted", RESTARTS)
def test_a_wish_that_only_a_vanished_device_may_hold_waits_in_silence(restarted: str) -> None:
    """It is a person's to end; until then nobody tries anything for it."""
    house = House()
    for when_ms, names in {**RESTARTS[restarted], house.world.settings.forgotten_ms: ()}.items():
        house.world.run_until(max(house.world.now_ms, house.gone_ms + when_ms))
        house.restart(names)
    house.go_on(house.world.settings.forgotten_ms + SETTLED_MS)  # who was restarted has listened for so long, too
    house.expect_idle()
    assert [len(state.wishes) for state in house.states()] == [WISHES] * 2
    assert all(len(state.members) == 2 for state in house.states())
    assert {name for name, _, _ in house.done(StartFetch)} == {"attic"}
