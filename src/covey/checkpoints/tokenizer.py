"""Between text and token ids, from nothing but the metadata of a GGUF file.

The merging is done by the `tokenizers` library. What is done here is what GGUF files and llama.cpp leave to the
program around it: which texts are markup, and who may write them. A control token (`<|im_end|>`) that a user typed is
plain text; only what a chat template wrote is markup.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from msgspec import Struct

from covey.checkpoints import metadata as read
from covey.checkpoints.checkpoint import Checkpoint, CheckpointError
from covey.checkpoints.hub_folder import TOKENIZER, TOKENIZER_CONFIG
from covey.checkpoints.hub_tokenizer import read_hub_tokenizer, read_hub_vocabulary
from covey.checkpoints.mergers import Before, ByteLevelMerger, Merger, SentencePieceMerger, merge_pairs
from covey.checkpoints.metadata import Metadata
from covey.checkpoints.pretokenizers import SPLITTERS, WordSplitter
from covey.checkpoints.vocabulary import MARKUP_KINDS, TokenKind, Vocabulary, read_vocabulary

Span = tuple[int, int]


class TextPart(NamedTuple):
    """A piece of a prompt; the text of a control token is that token only in markup."""

    text: str
    is_markup: bool


class TextTokenizer:
    """Made by `load_tokenizer`. Immutable, so it may be used from several threads."""

    def __init__(self, vocabulary: Vocabulary, merger: Merger, options: "_Options") -> None:
        self._vocabulary = vocabulary
        self._merger = merger
        self._options = options
        odd = [i for i, kind in enumerate(vocabulary.kinds) if kind != TokenKind.NORMAL]
        markup = [vocabulary.texts[i] for i in odd if vocabulary.kinds[i] in MARKUP_KINDS]
        plain = [vocabulary.texts[i] for i in odd if vocabulary.kinds[i] == TokenKind.USER_DEFINED]
        self._atoms = re.compile(_any_of(markup + plain))
        self._plain_atoms = re.compile(_any_of(plain))
        self._control_starts = re.compile(f"(?={_any_of(markup)})")

    @property
    def vocabulary_size(self) -> int:
        return len(self._vocabulary.texts)

    @property
    def bos(self) -> str:
        """The text of the token that begins a text, or nothing."""
        return self._text_or_nothing(self._vocabulary.bos_id)

    @property
    def eos(self) -> str:
        return self._text_or_nothing(self._vocabulary.eos_id)

    @property
    def bos_id(self) -> int | None:
        return self._vocabulary.bos_id

    @property
    def eos_id(self) -> int | None:
        return self._vocabulary.eos_id

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Any of these ends a generation."""
        return self._vocabulary.stop_ids

    @property
    def chat_template(self) -> str | None:
        return self._options.chat_template

    def encode(self, text: str, *, parse_special: bool, add_special: bool) -> list[int]:
        """Token ids of `text`.

        With `parse_special` the texts of control tokens become those tokens. With `add_special` the tokens are added
        that the model wants before and after a text, whether or not they are there already.
        """
        return [
            *self._ends(self._options.adds_bos and add_special, self._vocabulary.bos_id),
            *self._encode_parts([TextPart(text, parse_special)]),
            *self._ends(self._options.adds_eos and add_special, self._vocabulary.eos_id),
        ]

    def encode_chat(self, parts: Iterable[tuple[str, bool]]) -> list[int]:
        """Token ids of a rendered chat, in parts (see `TextPart`).

        If the model wants a token before a text, they begin with it exactly once, whatever the template wrote.
        """
        ids = self._encode_parts(parts)
        bos = self._ends(self._options.adds_bos, self._vocabulary.bos_id)
        return ids if ids[:1] == bos else bos + ids

    def encode_within(self, text: str) -> list[int]:
        """Token ids of a plain text that goes on where another one ended: nothing is put before it."""
        return self._encode_parts([TextPart(text, is_markup=False)], Before.TEXT)

    def control_positions(self, text: str) -> list[int]:
        """Where in `text` the text of a control token begins."""
        return [match.start() for match in self._control_starts.finditer(text)]

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text; nothing for markup. UTF-8 only together with its neighbours.

        Nothing, too, for the ids by which some models round up their vocabulary: they have no text.
        """
        if token_id >= self.vocabulary_size:
            return b""
        return self._merger.token_bytes(self._vocabulary.texts[token_id], self._vocabulary.kinds[token_id])

    def token_text(self, token_id: int) -> str:
        """The token for people to read: what it adds to a text, or the name of markup; U+FFFD for half a character."""
        text = self.token_bytes(token_id).decode("utf-8", "replace")
        return text or (self._vocabulary.texts[token_id] if token_id < self.vocabulary_size else "")

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of all tokens together; what is no valid UTF-8 becomes U+FFFD."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")

    def _text_or_nothing(self, token_id: int | None) -> str:
        return "" if token_id is None else self._vocabulary.texts[token_id]

    @staticmethod
    def _ends(wanted: bool, token_id: int | None) -> list[int]:  # noqa: FBT001  # private and read in place
        return [token_id] if wanted and token_id is not None else []

    def _encode_parts(self, parts: Iterable[tuple[str, bool]], after: Before = Before.NOTHING) -> list[int]:
        """Parts are joined before they are cut into words, as a word may reach from one part into the next."""
        text, markup = _joined(parts)
        ids: list[int] = []
        for piece in self._pieces(text, markup):
            ids += self._merger.encode(piece, after) if isinstance(piece, str) else [piece]
            after = Before.TEXT if isinstance(piece, str) else Before.MARKUP
        return ids

    def _pieces(self, text: str, markup: list[Span]) -> Iterator[str | int]:
        """Plain texts, and ids of the tokens that stand for a text as a whole."""
        done = position = 0
        while match := self._atoms.search(text, position):
            if self._is_control(match[0]) and not _is_within(match.span(), markup):
                match = self._plain_atoms.match(text, match.start()) or match.start()
            if isinstance(match, int):
                position = match + 1
                continue
            token_id = self._vocabulary.ids[match[0]]
            start, end = self._span(token_id, text, match.span())
            if start > done:
                yield text[done:start]
            yield token_id
            done = position = end
        if done < len(text):
            yield text[done:]

    def _span(self, token_id: int, text: str, span: Span) -> Span:
        """With the blanks around the token that it swallows."""
        strips_before, strips_behind = self._vocabulary.strips.get(token_id, (False, False))
        start, end = span
        if strips_before:
            start = len(text[:start].rstrip())
        if strips_behind:
            end = len(text) - len(text[end:].lstrip())
        return start, end

    def _is_control(self, text: str) -> bool:
        return self._vocabulary.kinds[self._vocabulary.ids[text]] in MARKUP_KINDS


def load_tokenizer(header: Checkpoint) -> TextTokenizer:
    """The tokenizer that the file carries. Raises `CheckpointError`."""
    metadata = header.metadata
    if _is_folder(metadata):
        vocabulary, merger, adds_bos, adds_eos = read_hub_tokenizer(metadata)
        template = read.optional_text(metadata, "tokenizer.chat_template")
        return TextTokenizer(vocabulary, merger, _Options(adds_bos, adds_eos, template))
    model = read.text(metadata, "tokenizer.ggml.model")
    if model == "gpt2":
        return _byte_level(metadata)
    if model == "llama":
        return _sentence_piece(metadata)
    raise CheckpointError(
        f"the model file has a tokenizer of type {model!r} ('tokenizer.ggml.model'), which is not known here; "
        f"known are gpt2 and llama"
    )


def token_texts(header: Checkpoint) -> list[str]:
    """By id, as files of all kinds write them; nothing for those that only fill up the numbers.

    Raises `CheckpointError`.
    """
    metadata = header.metadata
    vocabulary = read_hub_vocabulary(metadata) if _is_folder(metadata) else read_vocabulary(metadata)
    named = zip(vocabulary.texts, vocabulary.kinds, strict=True)
    return ["" if kind == TokenKind.UNUSED else text for text, kind in named]


def _is_folder(metadata: Metadata) -> bool:
    if TOKENIZER_CONFIG in metadata and TOKENIZER not in metadata:
        raise CheckpointError("the model's folder has no tokenizer.json, without which no text can be read")
    return TOKENIZER_CONFIG in metadata


class _Options(Struct, frozen=True):
    adds_bos: bool
    adds_eos: bool
    chat_template: str | None


def _options(metadata: Metadata, *, adds_bos: bool) -> _Options:
    return _Options(
        adds_bos=read.optional_flag(metadata, "tokenizer.ggml.add_bos_token", adds_bos),
        adds_eos=read.optional_flag(metadata, "tokenizer.ggml.add_eos_token", default=False),
        chat_template=read.optional_text(metadata, "tokenizer.chat_template"),
    )


def _byte_level(metadata: Metadata) -> TextTokenizer:
    splitter = _splitter(metadata)
    pairs = merge_pairs(read.texts(metadata, "tokenizer.ggml.merges"))
    words = {left + right for left, right in pairs}
    vocabulary = read_vocabulary(metadata, words)
    merger = ByteLevelMerger(vocabulary, pairs, words, splitter)
    return TextTokenizer(vocabulary, merger, _options(metadata, adds_bos=splitter.adds_bos))


def _splitter(metadata: Metadata) -> WordSplitter:
    name = read.optional_text(metadata, "tokenizer.ggml.pre") or "default"
    if name not in SPLITTERS:
        raise CheckpointError(
            f"the model file cuts words in a way that is not known here, {name!r} ('tokenizer.ggml.pre'); "
            f"known are {', '.join(sorted(SPLITTERS))}"
        )
    return SPLITTERS[name]


def _sentence_piece(metadata: Metadata) -> TextTokenizer:
    vocabulary = read_vocabulary(metadata)
    scores = read.numbers(metadata, "tokenizer.ggml.scores", len(vocabulary.texts))
    space_first = read.optional_flag(metadata, "tokenizer.ggml.add_space_prefix", default=True)
    return TextTokenizer(
        vocabulary,
        SentencePieceMerger(vocabulary, scores, space_first=space_first),
        _options(metadata, adds_bos=True),
    )


def _any_of(texts: list[str]) -> str:
    """Matches one of `texts`, of those that begin at one place the longest."""
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return f"(?:{'|'.join(map(re.escape, longest_first))})" if texts else "(?!)"


def _joined(parts: Iterable[tuple[str, bool]]) -> tuple[str, list[Span]]:
    """The whole text, and the spans of it that are markup, in order and not touching."""
    texts: list[str] = []
    markup: list[Span] = []
    position = 0
    for part, is_markup in parts:
        text = _valid(part)
        start, position = position, position + len(text)
        texts.append(text)
        if is_markup and text:
            begin = markup.pop()[0] if markup and markup[-1][1] == start else start
            markup.append((begin, position))
    return "".join(texts), markup


def _is_within(span: Span, spans: Sequence[Span]) -> bool:
    index = bisect_right(spans, span[0], key=lambda each: each[0]) - 1
    return index >= 0 and span[1] <= spans[index][1]


def _valid(text: str) -> str:
    """JSON can write half a surrogate pair, which no character is: it becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
