"""The vocabulary that a GGUF file carries: token texts, their kinds, and which tokens begin and end a text.

Which tokens end a generation is not written in the files in one way, so they are also known by their texts, as in
llama.cpp (src/llama-vocab.cpp), whose list this follows.
"""

from collections.abc import Set as AbstractSet
from enum import IntEnum
from typing import Final

from msgspec import Struct

from covey.checkpoints import metadata as read
from covey.checkpoints.checkpoint import CheckpointError
from covey.checkpoints.metadata import Metadata

TOKENS_MAX: Final = 1 << 24

STOP_IDS: Final = "covey.stop_token_ids"
_TURN_ENDS: Final = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>",
    "[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>", "<|eom_id|>", "<|return|>", "<|call|>", "<|flush|>",
    "<|calls|>", "</s>", "[EOS]", "<eos>", "<turn|>", "<|tool_response>", "[e~[",
)  # fmt: skip
# Tokens of code models that begin what follows a finished file; the first of each line that exists counts.
_FILE_ENDS: Final = (
    ("fim_pad", ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]")),
    ("fim_rep", ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>")),
    ("fim_sep", ("<|file_sep|>",)),
)
# gpt-oss writes its channels with these, and whoever reads its output must see them.
_ALWAYS_SHOWN: Final = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


class TokenKind(IntEnum):
    """`tokenizer.ggml.token_type` of the GGUF specification."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


MARKUP_KINDS: Final = frozenset({TokenKind.CONTROL, TokenKind.UNKNOWN})  # text can't contain these; they aren't shown


class Vocabulary(Struct, frozen=True):
    texts: list[str]
    kinds: list[int]  # of each token; see `TokenKind`
    ids: dict[str, int]
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    stop_ids: frozenset[int]
    strips: dict[int, tuple[bool, bool]] = {}  # tokens that swallow the blanks before them, behind them


def read_vocabulary(metadata: Metadata, words: AbstractSet[str] = frozenset()) -> Vocabulary:
    """`words` are what merging can make: never markup, even if they look like it (`</s>` is HTML to some models).

    Raises `CheckpointError` that names the key that is missing or absurd.
    """
    texts = [text or f"[EMPTY_{i}]" for i, text in enumerate(read.texts(metadata, "tokenizer.ggml.tokens"))]
    if len(texts) > TOKENS_MAX:
        raise CheckpointError(f"the model file is damaged: its 'tokenizer.ggml.tokens' has {len(texts)} entries")
    ids = {text: i for i, text in enumerate(texts)}
    kinds = _kinds(metadata, len(texts))
    stop_ids = _stop_ids(metadata, {text: i for text, i in ids.items() if text not in words}, len(texts))
    _correct_kinds(kinds, ids, stop_ids)
    return Vocabulary(
        texts=texts,
        kinds=kinds,
        ids=ids,
        bos_id=_special_id(metadata, "bos", len(texts)),
        eos_id=_special_id(metadata, "eos", len(texts)),
        unknown_id=_special_id(metadata, "unknown", len(texts)),
        stop_ids=frozenset(stop_ids),
    )


def _kinds(metadata: Metadata, count: int) -> list[int]:
    key = "tokenizer.ggml.token_type"
    return list(read.numbers(metadata, key, count)) if key in metadata else [int(TokenKind.NORMAL)] * count


def _special_id(metadata: Metadata, name: str, end: int) -> int | None:
    return read.optional_index(metadata, f"tokenizer.ggml.{name}_token_id", end)


def _stop_ids(metadata: Metadata, ids: dict[str, int], count: int) -> set[int]:
    stop = {ids[text] for text in _TURN_ENDS if text in ids} - {ids[text] for text in _no_ends(ids)}
    stated = [_special_id(metadata, name, count) for name in ("eos", "eot", "eom")]
    for name, texts in _FILE_ENDS:
        known = next((ids[text] for text in texts if text in ids), None)
        file_end = _special_id(metadata, name, count)
        stated.append(known if file_end is None else file_end)
    return stop | {each for each in stated if each is not None} | _listed_stop_ids(metadata, count)


def _listed_stop_ids(metadata: Metadata, count: int) -> set[int]:
    """Those of a hub's folder, which may state several."""
    listed = metadata.get(STOP_IDS, [])
    if any(each >= count for each in listed):
        raise CheckpointError(f"the model is damaged: its eos_token_id is {listed}, but it has {count} tokens")
    return set(listed)


def _no_ends(ids: dict[str, int]) -> list[str]:
    """Texts that end a turn elsewhere but not beside these others: harmony's `<|end|>` only ends a channel."""
    not_ends: list[str] = []
    if "<|end|>" in ids and ({"<|return|>", "<|call|>"} <= ids.keys() or _is_solar(ids)):
        not_ends.append("<|end|>")
    if "</s>" in ids and not ids.keys().isdisjoint({"<|tool_response>", "<|plamo:eos|>"}):
        not_ends.append("</s>")
    return not_ends


def _is_solar(ids: dict[str, int]) -> bool:
    return "<|flush|>" in ids and not ids.keys().isdisjoint({"<|call|>", "<|calls|>"})


def _correct_kinds(kinds: list[int], ids: dict[str, int], stop_ids: set[int]) -> None:
    """Some files call tokens normal that are markup: as such they would be shown, and taken from users."""
    for token_id in stop_ids:
        kinds[token_id] = TokenKind.CONTROL
    for text in _ALWAYS_SHOWN:
        if text in ids:
            kinds[ids[text]] = TokenKind.USER_DEFINED
    if "<|end|>" in _no_ends(ids):
        kinds[ids["<|end|>"]] = TokenKind.USER_DEFINED
    if "</s>" in _no_ends(ids):
        kinds[ids["</s>"]] = TokenKind.NORMAL
