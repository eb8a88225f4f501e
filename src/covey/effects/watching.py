"""What is watched for as long as a node runs: its hardware, the models on its disk, and what happens in the cluster."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

import anyio
import anyio.to_thread

from covey.control.activity import EVENTS_MAX, Activity
from covey.effects import clock
from covey.effects.driver import Driver
from covey.effects.mailbox import Mailbox
from covey.effects.model_files import ModelFiles
from covey.effects.probe import Probe
from covey.schema.activity import ActivityEvent
from covey.schema.ids import ModelId
from covey.schema.machine import HardwareProbed, ModelsListed
from covey.schema.model import ModelCard

LOOK_S: Final = 3.0  # memory moves within seconds; a look takes about a millisecond
ACTIVITY_SPACING_S: Final = 0.2  # what came and went within that is no news
WAIT_S_MAX: Final = 3600.0

_log = logging.getLogger(__name__)


class Runners(Protocol):
    def process_ids(self) -> Sequence[int]: ...
    def next_end(self) -> anyio.Event: ...


async def watch_hardware(probe: Probe, mailbox: Mailbox, runners: Runners) -> None:
    """For ever, and at once when a runner has ended: the next one waits for what is free then.

    Whether a change is worth telling others is the machine's to decide.
    """
    while True:
        ended = runners.next_end()
        try:
            mailbox.offer(await anyio.to_thread.run_sync(_look, probe, runners.process_ids()))
        except OSError as error:
            _log.warning("this machine's memory and disk could not be read: %s", error)
        with anyio.move_on_after(LOOK_S):
            await ended.wait()


def _look(probe: Probe, process_ids: Sequence[int]) -> HardwareProbed:
    return HardwareProbed(probe.hardware(), probe.resident_bytes(process_ids))


class ModelWatch:
    """Looks at the models folder every `LOOK_S`, since a person may delete a file by hand, and keeps what it found: who
    asks in between is answered without a look at the disk.
    """

    def __init__(self, files: ModelFiles, placed: Callable[[], Iterable[ModelCard]]) -> None:
        """`placed` gives the models of the cluster's instances."""
        self._files = files
        self._placed = placed
        self._known: tuple[ModelCard, ...] = ()
        self._on_disk: frozenset[ModelCard] = frozenset()

    def cards(self) -> list[ModelCard]:
        """The models that are known here, then those that are placed, in a stable order."""
        known = {card.model_id for card in self._known}
        placed = {card.model_id: card for card in self._placed() if card.model_id not in known}
        return [*self._known, *placed.values()]

    def is_on_disk(self, card: ModelCard) -> bool:
        return card in self._on_disk

    async def look(self) -> None:
        """Looks at once."""
        placed = tuple(self._placed())
        self._known = tuple(await anyio.to_thread.run_sync(self._files.known))
        self._on_disk = await anyio.to_thread.run_sync(_on_disk, self._files, (*self._known, *placed))

    async def run(self, mailbox: Mailbox) -> None:
        """For ever. Tells when what lies on the disk has changed."""
        told: tuple[ModelId, ...] | None = None
        while True:
            await self.look()
            found = tuple(card.model_id for card in self._known if self.is_on_disk(card))
            if found != told:
                await mailbox.put(ModelsListed(found))
                told = found
            await anyio.sleep(LOOK_S)


async def watch_activity(driver: Driver, activity: Activity, tell: Callable[[ActivityEvent], None]) -> None:
    """For ever. Keeps the account of what changed in the cluster, and tells it as it grows."""
    told = 0
    while True:
        state = driver.state()
        activity.see(clock.unix_ms(), state, driver.keys())
        for event in activity.page(told, EVENTS_MAX).events:
            tell(event)
            told = event.number
        await anyio.sleep(ACTIVITY_SPACING_S)
        await driver.wait_changed(state.revision, WAIT_S_MAX)


def _on_disk(files: ModelFiles, cards: tuple[ModelCard, ...]) -> frozenset[ModelCard]:
    return frozenset(card for card in cards if files.is_on_disk(card))
