"""Models from a hub that is near, far, broken, rate-limiting, lying or gone."""

from collections.abc import Iterator
from pathlib import Path

import anyio
import msgspec
import pytest
from hub_server import COMMIT, Hub, serving
from tiny_model import write_model

from covey.checkpoints.checkpoint import Checkpoint
from covey.effects import hub as hub_module
from covey.effects.fetching import FetchError
from covey.effects.model_files import ModelFiles, ModelNotFoundError
from covey.schema.model import HubSource
from covey.serving.model_text import load_model_text

pytestmark = pytest.mark.anyio

NAME = "hf:owner/repo/sub/model.gguf"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(hub_module, "PAUSE_S_FIRST", 0.01)
        server.files["owner/repo/sub/model.gguf"] = write_model(tmp_path / "m.gguf", 3_000_000).read_bytes()
        server.files["owner/repo/text.gguf"] = b"this is no model" * 100
        yield server


@pytest.fixture
def files(tmp_path: Path) -> ModelFiles:
    return ModelFiles(tmp_path / "models")


def ignore(bytes_done: int, bytes_total: int) -> None:
    pass


async def test_a_card_is_known_before_the_file_is_fetched(hub: Hub, files: ModelFiles) -> None:
    """40 GB: placement must not wait for them."""
    card = await files.resolve(NAME)
    assert card.source == HubSource("owner/repo", "sub/model.gguf", COMMIT)  # all nodes fetch the same bytes
    assert card.model_id == NAME
    assert card.file_bytes == len(hub.files["owner/repo/sub/model.gguf"])
    assert hub.gets() == ["bytes=0-1048575"]
    assert not files.is_on_disk(card)


async def test_the_file_comes_whole_and_only_once(hub: Hub, files: ModelFiles) -> None:
    card = await files.resolve(NAME)
    steps: list[int] = []
    path = await files.ensure(card, lambda done, _: steps.append(done))
    assert path.read_bytes() == hub.files["owner/repo/sub/model.gguf"]
    assert path.name == "model.gguf"
    seen = len(hub.requests)
    await files.ensure(card, ignore)
    assert len(hub.requests) == seen
    assert sorted(item.name for item in path.parent.iterdir()) == ["card.json", "lock", "model.gguf"]


async def test_what_was_looked_up_elsewhere_is_listed_where_it_was_fetched(
    hub: Hub, files: ModelFiles, tmp_path: Path
) -> None:
    """Else nobody would miss the file there, should a person delete it."""
    card = await files.resolve(NAME)
    other = ModelFiles(tmp_path / "another machine")
    await other.ensure(card, ignore)
    assert card in other.known()


async def test_what_was_fetched_can_be_named_without_a_network(hub: Hub, files: ModelFiles, monkeypatch) -> None:
    card = await files.resolve(NAME)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelNotFoundError, match="can't be reached") as caught:
        await files.resolve(NAME)  # known, but of no use without its file
    assert caught.value.status == 503
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    await files.ensure(card, ignore)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert await files.resolve(NAME) == card
    assert card in files.known()
    await files.ensure(card, ignore)


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("hf:owner/repo/other.gguf", 404, "is not on the hub"),
        ("hf:owner/nothing/model.gguf", 404, "is not on the hub"),
        ("hf:owner/repo/sub/model.gguf@v9", 404, "has no revision 'v9'"),
        ("hf:owner/repo/text.gguf", 400, "not a GGUF file"),
    ],
)
async def test_what_the_hub_has_not(hub: Hub, files: ModelFiles, name: str, status: int, message: str) -> None:
    with pytest.raises(ModelNotFoundError, match=message) as caught:
        await files.resolve(name)
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("status", "ours", "message"),
    [(403, 403, "needs its owner's permission"), (429, 503, "asked too often"), (500, 502, "HTTP status 500")],
)
async def test_a_hub_that_refuses(hub: Hub, files: ModelFiles, status: int, ours: int, message: str) -> None:
    hub.statuses = [status]
    with pytest.raises(ModelNotFoundError, match=message) as caught:
        await files.resolve(NAME)
    assert caught.value.status == ours


async def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub: Hub, files: ModelFiles) -> None:
    card = await files.resolve(NAME)
    hub.requests.clear()
    hub.cut_after = [100_000, 50_000]
    path = await files.ensure(card, ignore)
    assert path.read_bytes() == hub.files["owner/repo/sub/model.gguf"]
    last = card.file_bytes - 1
    assert hub.gets() == [f"bytes=0-{last}", f"bytes=100000-{last}", f"bytes=150000-{last}"]


async def test_a_tired_hub_is_asked_again_then_left_alone(hub: Hub, files: ModelFiles) -> None:
    card = await files.resolve(NAME)
    file = await hub_module.locate(card.source)
    work = files.path_of(card.source).parent
    hub.statuses = [429, 503]
    await hub_module.fetch_from_hub(file, work)
    (work / "model").unlink()
    hub.requests.clear()
    hub.statuses = [500] * 20
    with pytest.raises(FetchError, match="HTTP status 500") as caught:
        await hub_module.fetch_from_hub(file, work)
    assert not caught.value.is_final
    assert len(hub.requests) == hub_module.TRIES_MAX


@pytest.mark.parametrize(("bytes_sent", "ignores_ranges"), [(0, False), (0, True), (1_000, True)])
async def test_answers_that_are_whole_but_too_short_end_the_fetch(
    hub: Hub, files: ModelFiles, bytes_sent: int, *, ignores_ranges: bool
) -> None:
    """A login page of a hotel answers 200 to everything: no error, and never the file."""
    card = await files.resolve(NAME)
    hub.requests.clear()
    hub.sends_only, hub.ignores_ranges = bytes_sent, ignores_ranges
    with anyio.fail_after(5), pytest.raises(FetchError, match=f"sent only {bytes_sent} of the {card.file_bytes} bytes"):
        await files.ensure(card, ignore)
    assert len(hub.gets()) == hub_module.TRIES_MAX
    hub.sends_only, hub.ignores_ranges = None, False
    path = await files.ensure(card, ignore)
    assert path.read_bytes() == hub.files["owner/repo/sub/model.gguf"]


async def test_what_an_earlier_life_fetched_is_not_fetched_again(hub: Hub, files: ModelFiles) -> None:
    """The node was killed in the middle of 40 GB."""
    card = await files.resolve(NAME)
    work = files.path_of(card.source).parent / "fetching"
    work.mkdir()
    (work / "model").write_bytes(hub.files["owner/repo/sub/model.gguf"][:2_000_000])
    hub.requests.clear()
    path = await files.ensure(card, ignore)
    assert hub.gets() == [f"bytes=2000000-{card.file_bytes - 1}"]
    assert path.read_bytes() == hub.files["owner/repo/sub/model.gguf"]


@pytest.mark.parametrize("litter", ["model.gguf/not-empty", "fetching", "lock/not-empty", "fetching/model/not-empty"])
async def test_what_lies_in_the_way_is_for_a_person_to_take_away(hub: Hub, files: ModelFiles, litter: str) -> None:
    """It is not deleted, the file is not fetched in vain, and the same is not tried again and again."""
    card = await files.resolve(NAME)
    path = files.path_of(card.source).parent / litter
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"litter")
    with pytest.raises(FetchError) as failed:
        await files.ensure(card, ignore)
    assert failed.value.is_final
    in_the_way = path.parent if path.name == "not-empty" else path
    assert str(failed.value) == f"{in_the_way} is in the way of this model's file; move it away"
    assert path.read_bytes() == b"litter"
    assert len(hub.gets()) == 1  # the header


async def test_a_server_without_ranges_is_read_from_the_start(hub: Hub, files: ModelFiles) -> None:
    hub.ignores_ranges = True
    card = await files.resolve(NAME)
    hub.cut_after = [100_000]
    path = await files.ensure(card, ignore)
    assert path.read_bytes() == hub.files["owner/repo/sub/model.gguf"]


async def test_damage_on_the_way_is_seen_and_thrown_away(hub: Hub, files: ModelFiles) -> None:
    card = await files.resolve(NAME)
    hub.etag = "0" * 64
    with pytest.raises(FetchError, match="its SHA-256 differs") as caught:
        await files.ensure(card, ignore)
    assert (caught.value.is_final, caught.value.is_damaged) == (True, True)
    assert not files.is_on_disk(card)
    hub.etag = None
    assert (await files.ensure(card, ignore)).exists()


async def test_a_file_that_changed_since_it_was_placed(hub: Hub, files: ModelFiles) -> None:
    card = await files.resolve(NAME)
    with pytest.raises(FetchError, match="has changed on the hub") as caught:
        await files.ensure(msgspec.structs.replace(card, file_bytes=card.file_bytes + 1), ignore)
    assert caught.value.is_final


async def test_a_file_that_changes_while_it_is_fetched(hub: Hub, files: ModelFiles) -> None:
    card = await files.resolve(NAME)
    file = await hub_module.locate(card.source)
    hub.files["owner/repo/sub/model.gguf"] += b"more"
    with pytest.raises(FetchError, match=r"not the \d+ that the hub told before") as caught:
        await hub_module.fetch_from_hub(file, files.path_of(card.source).parent)
    assert caught.value.is_final


async def test_a_header_larger_than_the_first_read(hub: Hub, files: ModelFiles, monkeypatch) -> None:
    monkeypatch.setattr(hub_module, "HEADER_BYTES_FIRST", 100)
    assert (await files.resolve(NAME)).layer_count == 1
    assert len(hub.gets()) > 1


async def test_a_node_without_a_part_of_a_model_fetches_its_header_alone(hub: Hub, files: ModelFiles) -> None:
    """Its tokenizer is all that such a node needs, and the file may have 40 GB."""
    card = await files.resolve(NAME)
    hub.requests.clear()
    header = await files.text_source(card)
    assert isinstance(header, Checkpoint)
    assert load_model_text(header).stop_token_ids
    assert hub.gets() == ["bytes=0-1048575"]
    assert not files.is_on_disk(card)
    path = await files.ensure(card, ignore)
    assert await files.text_source(card) == path


async def test_a_header_that_is_no_longer_the_placed_file_s(hub: Hub, files: ModelFiles) -> None:
    card = await files.resolve(NAME)
    with pytest.raises(FetchError, match="has changed on the hub"):
        await files.text_source(msgspec.structs.replace(card, file_bytes=card.file_bytes + 1))
    hub.files["owner/repo/sub/model.gguf"] = b"?" * card.file_bytes
    with pytest.raises(FetchError, match="can't be read: this is not a GGUF file"):
        await files.text_source(card)


async def test_a_cancelled_fetch_keeps_what_it_has(hub: Hub, files: ModelFiles) -> None:
    card = await files.resolve(NAME)
    hub.statuses = [200]
    with anyio.move_on_after(0):
        await files.ensure(card, ignore)
    assert not files.is_on_disk(card)
    hub.statuses = []
    assert (await files.ensure(card, ignore)).exists()


async def test_a_token_is_sent_to_the_hub(hub: Hub, files: ModelFiles, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    await files.resolve(NAME)
    assert set(hub.authorization) == {"Bearer hf_secret"}


async def test_nothing_is_told_to_anybody_else() -> None:
    from huggingface_hub import constants

    assert constants.HF_HUB_DISABLE_TELEMETRY
