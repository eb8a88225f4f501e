"""From a plain text to the ids of a vocabulary, by merging, and back: the two ways that GGUF knows, and the hub's.

Markup is not known here: `tokenizer` has taken it out of the text before.
"""

import re
from collections.abc import Set as AbstractSet
from enum import Enum
from typing import Any, Final, Protocol

from tokenizers import Tokenizer
from tokenizers.models import BPE

from covey.checkpoints.checkpoint import CheckpointError
from covey.checkpoints.pretokenizers import WordSplitter, pre_tokenizer
from covey.checkpoints.vocabulary import MARKUP_KINDS, TokenKind, Vocabulary

_SPACE: Final = "\u2581"  # SentencePiece writes a space so
Pair = tuple[str, str]
_LOST: Final = "a byte that is no token"  # has spaces, which no word has after its bytes were written as characters
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Before(Enum):
    """What a piece of text comes after: some ways of merging put a space before it, and not after each."""

    NOTHING = "nothing"
    MARKUP = "markup"
    TEXT = "text"


class Merger(Protocol):
    def encode(self, text: str, after: Before) -> list[int]:
        """Token ids of `text`, which comes after nothing, after markup, or goes on where another text ended."""
        ...

    def token_bytes(self, text: str, kind: int) -> bytes:
        """What a token of that text and kind adds to a text."""
        ...


class ByteLevelMerger:
    """Byte-level BPE (GPT-2 and its heirs): bytes are written as printable characters, and merged within words."""

    def __init__(
        self, vocabulary: Vocabulary, pairs: list[Pair], words: AbstractSet[str], splitter: WordSplitter
    ) -> None:
        tokens = _mergeable(vocabulary, words)
        # A byte that is no token yields nothing, yet keeps its neighbours from merging: it needs an id to be dropped.
        self._lost = len(vocabulary.texts)
        tokens[_LOST] = self._lost
        self._tokenizer = _tokenizer(tokens, pairs, ignore_merges=splitter.whole_words_first, unk_token=_LOST)
        self._tokenizer.pre_tokenizer = pre_tokenizer(splitter)  # pyright: ignore[reportAttributeAccessIssue]  # settable

    def encode(self, text: str, after: Before) -> list[int]:
        del after  # only a SentencePiece puts something before it
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [each for each in ids if each != self._lost] if self._lost in ids else ids

    def token_bytes(self, text: str, kind: int) -> bytes:
        return _from_printable(text) if kind == TokenKind.NORMAL else _bytes_of_odd(text, kind)


class SentencePieceMerger:
    """SentencePiece's BPE: the whole text is merged, best score first; characters that are no token become bytes."""

    def __init__(self, vocabulary: Vocabulary, scores: list[float], *, space_first: bool) -> None:
        self._space_first = space_first
        unknown = None if vocabulary.unknown_id is None else vocabulary.texts[vocabulary.unknown_id]
        tokens = _mergeable(vocabulary)
        if unknown is not None:
            tokens[unknown] = vocabulary.ids[unknown]
        self._tokenizer = _tokenizer(tokens, _pairs(vocabulary, scores), byte_fallback=True, unk_token=unknown)

    def encode(self, text: str, after: Before) -> list[int]:
        spaced = " " + text if self._space_first and after is not Before.TEXT else text
        return self._tokenizer.encode(spaced.replace(" ", _SPACE), add_special_tokens=False).ids

    def token_bytes(self, text: str, kind: int) -> bytes:
        return text.replace(_SPACE, " ").encode() if kind == TokenKind.NORMAL else _bytes_of_odd(text, kind)


class HubMerger:
    """Whatever a `tokenizer.json` says, without its added tokens."""

    def __init__(self, tokenizers: dict[Before, Tokenizer], *, is_byte_level: bool) -> None:
        self._tokenizers = tokenizers
        self._is_byte_level = is_byte_level

    def encode(self, text: str, after: Before) -> list[int]:
        return self._tokenizers[after].encode(text, add_special_tokens=False).ids

    def token_bytes(self, text: str, kind: int) -> bytes:
        if kind != TokenKind.NORMAL:
            return _bytes_of_odd(text, kind)
        return _from_printable(text) if self._is_byte_level else text.replace(_SPACE, " ").encode()


def _tokenizer(tokens: dict[str, int], pairs: list[Pair], **options: Any) -> Tokenizer:
    try:
        return Tokenizer(BPE(tokens, pairs, **options))
    except Exception as error:  # noqa: BLE001  # the library raises nothing narrower for a merge that names no token
        raise CheckpointError(f"the model file is damaged: its merges don't fit its tokens ({error})") from None


def _mergeable(vocabulary: Vocabulary, words: AbstractSet[str] = frozenset()) -> dict[str, int]:
    """All tokens but markup, which no text may yield; what merges make (`words`) must be there even so."""
    tokens = dict(vocabulary.ids)
    for i, kind in enumerate(vocabulary.kinds):
        if kind in MARKUP_KINDS and vocabulary.texts[i] not in words:
            tokens.pop(vocabulary.texts[i], None)
    return tokens


def merge_pairs(merges: list[str]) -> list[Pair]:
    """Each merge is written `LEFT RIGHT`. Raises `CheckpointError`."""
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    if not all(left and right for left, right in pairs):
        raise CheckpointError("the model file is damaged: an entry of its 'tokenizer.ggml.merges' is no pair")
    return pairs


def _pairs(vocabulary: Vocabulary, scores: list[float]) -> list[Pair]:
    """SentencePiece has no list of merges: any two neighbours that make a token merge, best score first."""
    ids = vocabulary.ids
    normal = [i for i, kind in enumerate(vocabulary.kinds) if kind in {TokenKind.NORMAL, TokenKind.USER_DEFINED}]
    pairs: list[Pair] = []
    for i in sorted(normal, key=lambda i: (-scores[i], i)):
        text = vocabulary.texts[i]
        cuts = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        pairs += [(left, right) for left, right in cuts if left in ids and right in ids]
    return pairs


def _bytes_of_odd(text: str, kind: int) -> bytes:
    if kind == TokenKind.USER_DEFINED:
        return text.encode()
    if kind == TokenKind.BYTE and (match := _BYTE_TOKEN.fullmatch(text)):
        return bytes.fromhex(match[1])
    return b""


def _printable_bytes() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, other bytes for the characters from U+0100 on."""
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF: Final = _printable_bytes()


def _from_printable(text: str) -> bytes:
    """A character outside the alphabet, which only an odd file has, stands for itself."""
    try:
        return bytes([_BYTE_OF[character] for character in text])
    except KeyError:
        return b"".join(bytes([_BYTE_OF[each]]) if each in _BYTE_OF else each.encode() for each in text)
