"""What a model's file says about text: its chat template and tokenizer, read once and kept.

The files of large vocabularies take a second to read, so it happens in a thread; so does tokenising a prompt, which
may be megabytes long.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final, Protocol

from covey.checkpoints.checkpoint import Checkpoint, CheckpointError
from covey.checkpoints.opening import open_checkpoint
from covey.checkpoints.tokenizer import TextTokenizer, load_tokenizer
from covey.schema.generation import ChatMessage
from covey.schema.ids import ModelId
from covey.schema.model import ModelCard
from covey.serving.refusal import MESSAGES, RefusedError
from covey.text import chat

BAD_REQUEST: Final = 400
SERVER_ERROR: Final = 500
KEPT_MAX: Final = 16  # models; a tokenizer takes some 50 MB


class ModelText(Protocol):
    """One model's way with text. Its methods are called from several threads."""

    @property
    def stop_token_ids(self) -> frozenset[int]: ...

    def prompt_ids(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The prompt as the model's template writes it. Raises `RefusedError` if the template refuses it."""
        ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def token_text(self, token_id: int) -> str:
        """For people to read: markup has its name."""
        ...


class FileText:
    """The text of a model whose file carries its tokenizer and, mostly, its chat template."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer

    @property
    def stop_token_ids(self) -> frozenset[int]:
        return self._tokenizer.stop_token_ids

    def prompt_ids(self, messages: Sequence[ChatMessage]) -> list[int]:
        tokenizer = self._tokenizer
        try:
            parts = chat.render_parts(
                tokenizer.chat_template or chat.PLAIN_TEMPLATE,
                messages,
                bos=tokenizer.bos,
                eos=tokenizer.eos,
                control_positions=tokenizer.control_positions,
                now=datetime.now().astimezone(),
            )
        except chat.TemplateRefusedError as error:
            raise RefusedError(f"{str(error).rstrip('.')}.", BAD_REQUEST, MESSAGES) from None
        return tokenizer.encode_chat(parts)

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        return self._tokenizer.token_text(token_id)


def load_model_text(source: Path | Checkpoint) -> ModelText:
    """Of a model's file or folder, or of its header. Raises `RefusedError`."""
    try:
        return FileText(load_tokenizer(source if isinstance(source, Checkpoint) else open_checkpoint(source)))
    except (CheckpointError, OSError) as error:
        place = "the model's header" if isinstance(source, Checkpoint) else source.name
        raise RefusedError(f"The tokenizer in {place} can't be read: {error}.", SERVER_ERROR) from None


class ModelTexts:
    """The texts of the models that were asked for last. `source_of` makes a file or its header present, `load` reads
    the text from it (slow).
    """

    def __init__(
        self,
        source_of: Callable[[ModelCard], Awaitable[Path | Checkpoint]],
        load: Callable[[Path | Checkpoint], ModelText] = load_model_text,
    ) -> None:
        self._source_of = source_of
        self._load = load
        # The last used is the last. A future each: whoever gives up waiting leaves what is being read to the next.
        self._kept: dict[ModelId, tuple[ModelCard, asyncio.Future[ModelText]]] = {}
        self._locks: defaultdict[ModelId, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def of(self, card: ModelCard) -> ModelText:
        """Reads the file once for a card, unless that failed. Raises `RefusedError`, as do `source_of` and `load`."""
        async with self._locks[card.model_id]:
            kept = self._kept.get(card.model_id)
            if kept is None or kept[0] != card or _has_failed(kept[1]):
                source = await self._source_of(card)
                kept = card, asyncio.get_running_loop().run_in_executor(None, self._load, source)
            self._kept.pop(card.model_id, None)
            self._kept[card.model_id] = kept
        while len(self._kept) > KEPT_MAX:
            oldest = next(iter(self._kept))
            del self._kept[oldest]
        return await asyncio.shield(kept[1])


def _has_failed(reading: asyncio.Future[ModelText]) -> bool:
    return reading.done() and (reading.cancelled() or reading.exception() is not None)
