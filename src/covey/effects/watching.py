"""What the control machine must know of its own node without asking: hardware, and which models lie on the disk."""

import logging
from typing import Final

import anyio
import anyio.to_thread

from covey.effects.mailbox import Mailbox
from covey.effects.model_files import ModelFiles
from covey.effects.probe import Probe
from covey.schema.ids import ModelId
from covey.schema.machine import HardwareProbed, ModelsListed

LOOK_S: Final = 3.0  # memory moves within seconds; a look takes about a millisecond

_log = logging.getLogger(__name__)


async def watch_hardware(probe: Probe, mailbox: Mailbox) -> None:
    """For ever. Whether a change is worth telling others is the machine's to decide."""
    while True:
        try:
            mailbox.offer(HardwareProbed(await anyio.to_thread.run_sync(probe.hardware)))
        except OSError as error:
            _log.warning("this machine's memory and disk could not be read: %s", error)
        await anyio.sleep(LOOK_S)


async def watch_models(files: ModelFiles, mailbox: Mailbox) -> None:
    """For ever, since a person may delete a file by hand."""
    known: tuple[ModelId, ...] | None = None
    while True:
        found = await anyio.to_thread.run_sync(_on_disk, files)
        if found != known:
            await mailbox.put(ModelsListed(found))
            known = found
        await anyio.sleep(LOOK_S)


def _on_disk(files: ModelFiles) -> tuple[ModelId, ...]:
    return tuple(card.model_id for card in files.known() if files.is_on_disk(card))
