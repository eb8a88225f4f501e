"""What a node notices of itself without being asked."""

import mmap
import os
from pathlib import Path

import anyio
import pytest
from tiny_model import card, write_model

from covey.checkpoints import catalogue
from covey.effects import watching
from covey.effects.mailbox import Mailbox
from covey.effects.model_files import ModelFiles
from covey.effects.probe import Probe
from covey.schema.machine import HardwareProbed, ModelsListed
from covey.schema.model import FileSource, HubSource

HELD_BYTES = 50_000_000


class Runners:
    """Those that run, and what tells that one has ended."""

    def __init__(self, *process_ids: int) -> None:
        self.ids = process_ids
        self.ended = anyio.Event()

    def process_ids(self) -> tuple[int, ...]:
        return self.ids

    def next_end(self) -> anyio.Event:
        return self.ended


pytestmark = pytest.mark.anyio


async def test_hardware_is_looked_at_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "LOOK_S", 0.01)
    mailbox = Mailbox()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watching.watch_hardware, Probe(Path("/")), mailbox, Runners())
        seen = [await mailbox.take(5) for _ in range(3)]
        tasks.cancel_scope.cancel()
    assert all(isinstance(item, HardwareProbed) for item in seen)
    mailbox.close()


async def test_what_runners_hold_is_read_with_the_memory_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "LOOK_S", 0.01)
    mailbox = Mailbox()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watching.watch_hardware, Probe(Path("/")), mailbox, Runners(os.getpid()))
        seen = await mailbox.take(5)
        assert isinstance(seen, HardwareProbed)
        assert seen.resident_bytes.keys() == {os.getpid()}
        grown = seen.resident_bytes[os.getpid()] + HELD_BYTES // 2
        held = mmap.mmap(-1, HELD_BYTES)  # an allocator may have as much left from the tests before
        held.write(bytes(HELD_BYTES))
        with anyio.fail_after(5):  # a look that was begun before may be told after
            while seen.resident_bytes[os.getpid()] < grown:
                seen = await mailbox.take(5)
                assert isinstance(seen, HardwareProbed)
        held.close()
        tasks.cancel_scope.cancel()
    mailbox.close()


async def test_the_end_of_a_runner_is_followed_by_a_look_at_once() -> None:
    """The next one waits for it."""
    mailbox, runners = Mailbox(), Runners()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watching.watch_hardware, Probe(Path("/")), mailbox, runners)
        assert isinstance(await mailbox.take(5), HardwareProbed)
        assert await mailbox.take(0.2) is None
        ended, runners.ended = runners.ended, anyio.Event()
        ended.set()
        assert isinstance(await mailbox.take(1), HardwareProbed)
        tasks.cancel_scope.cancel()
    mailbox.close()


async def test_a_model_deleted_by_hand_is_missed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(watching, "LOOK_S", 0.01)
    monkeypatch.setattr(catalogue, "listed", lambda: (listed,))
    model = write_model(tmp_path / "model.gguf")
    listed = card(model, "tiny", HubSource("owner/repo", "model.gguf"))
    files, mailbox = ModelFiles(tmp_path / "models"), Mailbox()
    path = files.path_of(listed.source)
    path.parent.mkdir(parents=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watching.ModelWatch(files, tuple).run, mailbox)
        assert await mailbox.take(5) == ModelsListed(())
        path.write_bytes(model.read_bytes())
        assert await mailbox.take(5) == ModelsListed((listed.model_id,))
        path.unlink()
        assert await mailbox.take(5) == ModelsListed(())
        assert await mailbox.take(0.05) is None  # nothing new is not told
        tasks.cancel_scope.cancel()
    mailbox.close()


async def test_models_are_told_without_a_look_at_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`GET /state` asks for them each time, and a slow disk must not stop all else that the node does."""
    model = write_model(tmp_path / "model.gguf")
    listed = card(model, "listed", HubSource("owner/repo", "model.gguf"))
    placed, later = (card(model, name, FileSource(str(model))) for name in ("placed", "later"))
    monkeypatch.setattr(catalogue, "listed", lambda: (listed,))
    placements = [placed]
    watch = watching.ModelWatch(ModelFiles(tmp_path / "models"), lambda: placements)
    assert watch.cards() == [placed]
    await watch.look()
    with monkeypatch.context() as blind:
        blind.setattr(Path, "stat", lambda *_: pytest.fail("the disk was asked"))
        blind.setattr(Path, "glob", lambda *_: pytest.fail("the disk was asked"))
        placements.append(later)
        assert watch.cards() == [listed, placed, later]
        assert [watch.is_on_disk(each) for each in watch.cards()] == [False, True, False]
    await watch.look()
    assert watch.is_on_disk(later)
