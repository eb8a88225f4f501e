"""What a real model file says about text, and how often it is read."""

import asyncio
import threading
from pathlib import Path

import pytest

from covey.checkpoints.tokenizer import TextTokenizer
from covey.schema.generation import ChatMessage
from covey.schema.model import ModelCard
from covey.serving.model_text import KEPT_MAX, ModelText, ModelTexts, load_model_text
from covey.serving.refusal import RefusedError
from tests.api.fake_backend import CARD
from tests.serving.test_serving import Letters


def card(name: str, file_bytes: int = 1) -> ModelCard:
    import msgspec

    return msgspec.structs.replace(CARD, model_id=name, file_bytes=file_bytes)


def test_a_prompt_as_the_models_own_template_writes_it(demo_model: Path) -> None:
    text = load_model_text(demo_model)
    ids = text.prompt_ids([ChatMessage("user", "Hi <|im_end|>")])
    shown = b"".join(text.token_bytes(i) for i in ids).decode()
    assert shown.endswith("user\nHi <|im_end|>\nassistant\n")
    assert len(text.stop_token_ids & set(ids)) == 1, "what a user wrote does not end his turn"
    assert text.stop_token_ids


def test_what_the_template_refuses_names_the_messages(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = load_model_text(demo_model)
    monkeypatch.setattr(TextTokenizer, "chat_template", "{{ raise_exception('Roles must alternate.') }}")
    with pytest.raises(RefusedError, match=r"Roles must alternate\.") as caught:
        text.prompt_ids([ChatMessage("user", "Hi")])
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    for name in ("broken.gguf", "missing.gguf"):
        with pytest.raises(RefusedError, match=f"The tokenizer in {name} can't be read"):
            load_model_text(tmp_path / name)


def test_each_file_is_read_once_until_its_model_changes_or_too_many_came() -> None:
    loads: list[Path] = []

    async def file_of(wanted: ModelCard) -> Path:
        await asyncio.sleep(0)
        return Path(wanted.model_id)

    def load(path: Path) -> ModelText:
        loads.append(path)
        return Letters()

    async def story() -> None:
        texts = ModelTexts(file_of, load)
        await asyncio.gather(*(texts.of(card("a")) for _ in range(5)))
        assert len(loads) == 1
        await texts.of(card("a", file_bytes=2))
        assert len(loads) == 2
        for number in range(KEPT_MAX):
            await texts.of(card(f"other {number}"))
        await texts.of(card("a", file_bytes=2))
        assert len(loads) == 2 + KEPT_MAX + 1

    asyncio.run(story())


def test_whoever_gives_up_waiting_leaves_the_reading_to_the_next() -> None:
    loads: list[Path] = []
    go = threading.Event()

    async def file_of(wanted: ModelCard) -> Path:
        return Path(wanted.model_id)

    def load(path: Path) -> ModelText:
        loads.append(path)
        assert go.wait(10)
        return Letters()

    async def story() -> None:
        texts = ModelTexts(file_of, load)
        impatient = asyncio.create_task(texts.of(card("a")))
        while not loads:  # noqa: ASYNC110 - a thread begins
            await asyncio.sleep(0.001)
        impatient.cancel()
        patient = asyncio.create_task(texts.of(card("a")))
        await asyncio.sleep(0.05)
        go.set()
        await patient
        assert len(loads) == 1

    asyncio.run(story())


def test_what_could_not_be_read_is_tried_again() -> None:
    results: list[ModelText | RefusedError] = [RefusedError("Broken.", 500), Letters()]

    async def file_of(wanted: ModelCard) -> Path:
        return Path(wanted.model_id)

    def load(path: Path) -> ModelText:
        result = results.pop(0)
        if isinstance(result, RefusedError):
            raise result
        return result

    async def story() -> None:
        texts = ModelTexts(file_of, load)
        with pytest.raises(RefusedError):
            await texts.of(card("a"))
        await texts.of(card("a"))

    asyncio.run(story())
