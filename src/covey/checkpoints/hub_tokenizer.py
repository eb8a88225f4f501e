"""The tokenizer of a Hugging Face folder: its `tokenizer.json` as the `tokenizers` library runs it, but for markup.

Which texts are markup, and who may write them, is `tokenizer`'s knowledge, as with GGUF files. So the added tokens are
taken out of the library's hands here, and what is left merges plain text alone.
"""

import re
from collections.abc import Callable, Iterator
from itertools import filterfalse
from typing import Any, Final

import msgspec
from tokenizers import Tokenizer

from covey.checkpoints import metadata as read
from covey.checkpoints.checkpoint import CheckpointError
from covey.checkpoints.hub_folder import TOKENIZER, TOKENIZER_CONFIG
from covey.checkpoints.mergers import Before, HubMerger
from covey.checkpoints.metadata import Metadata
from covey.checkpoints.vocabulary import MARKUP_KINDS, STOP_IDS, TOKENS_MAX, TokenKind, Vocabulary, read_vocabulary

_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")
Json = dict[str, Any]


class _Added(msgspec.Struct, frozen=True):
    """A token that is not merged from others."""

    id: int
    content: str
    special: bool = False
    normalized: bool = False  # searched for after the text was normalised, which only the library can do
    lstrip: bool = False
    rstrip: bool = False


def read_hub_tokenizer(metadata: Metadata) -> tuple[Vocabulary, HubMerger, bool, bool]:
    """Vocabulary, merger, and whether texts begin with the token for that, and end so. Raises `CheckpointError`."""
    stated = _decoded(read.text(metadata, TOKENIZER))
    model = _model(stated)
    added = _added_tokens(stated)
    words = {text for left, right in _pairs(model) for text in (left, right, left + right)}
    first, last = _ends(stated)
    vocabulary = read_vocabulary(_in_words_of_gguf(model, added, metadata, first, last), words)
    strips = {each.id: (each.lstrip, each.rstrip) for each in filterfalse(_is_left_to_library, added)}
    merger = _merger(stated, model, [each for each in added if _is_left_to_library(each)], _hidden(vocabulary, words))
    return msgspec.structs.replace(vocabulary, strips=strips), merger, bool(first), bool(last)


def read_hub_vocabulary(metadata: Metadata) -> Vocabulary:
    """The tokens alone, without what merging needs. Raises `CheckpointError`."""
    stated = _decoded(read.text(metadata, TOKENIZER))
    return read_vocabulary(_in_words_of_gguf(_model(stated), _added_tokens(stated), metadata, "", ""))


def _decoded(text: str) -> Json:
    try:
        stated = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise CheckpointError(f"the model's tokenizer.json is no JSON ({error})") from None
    if not isinstance(stated, dict):
        raise CheckpointError("the model's tokenizer.json holds no JSON object")
    return stated


def _model(stated: Json) -> Json:
    model = stated.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind != "BPE":
        raise CheckpointError(
            f"the model's tokenizer.json is of the type {kind!r}, which is not known here; known is BPE"
        )
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not all(_is_id(each) for each in vocab.values()):
        raise CheckpointError("the model's tokenizer.json is damaged: its vocab does not give each token a number")
    return model


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < TOKENS_MAX


def _added_tokens(stated: Json) -> list[_Added]:
    try:
        added = msgspec.convert(stated.get("added_tokens") or [], list[_Added])
    except msgspec.ValidationError as error:
        raise CheckpointError(f"the model's tokenizer.json is damaged: its added_tokens ({error})") from None
    if not all(_is_id(each.id) for each in added):
        raise CheckpointError("the model's tokenizer.json is damaged: its added_tokens have numbers that no token has")
    return added


def _pairs(model: Json) -> Iterator[tuple[str, str]]:
    """Older files write a merge as a text with a space between, newer ones as a list of two."""
    merges = model.get("merges")
    for merge in merges if isinstance(merges, list) else []:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or [type(each) for each in pair] != [str, str]:
            raise CheckpointError("the model's tokenizer.json is damaged: an entry of its merges is no pair")
        yield pair[0], pair[1]


def _in_words_of_gguf(model: Json, added: list[_Added], metadata: Metadata, first: str, last: str) -> Metadata:
    """What a GGUF file says about the same vocabulary."""
    ids: dict[str, int] = model["vocab"] | {each.content: each.id for each in added}
    texts = [""] * (max(ids.values(), default=-1) + 1)
    kinds = [int(TokenKind.UNUSED)] * len(texts)
    for text, token_id in ids.items():
        texts[token_id], kinds[token_id] = text, _kind(text, model)
    for each in filterfalse(_is_left_to_library, added):
        kinds[each.id] = int(TokenKind.CONTROL if each.special else TokenKind.USER_DEFINED)
    config = metadata.get(TOKENIZER_CONFIG) or {}
    named = {
        "bos": first or _token_text(config, "bos_token"),
        "eos": last or _token_text(config, "eos_token"),
        "unknown": model.get("unk_token"),
    }
    found: Metadata = {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": kinds}
    found |= {f"tokenizer.ggml.{name}_token_id": ids[text] for name, text in named.items() if text in ids}
    return found | {STOP_IDS: metadata.get(STOP_IDS, [])}


def _is_left_to_library(added: _Added) -> bool:
    return added.normalized and not added.special


def _kind(text: str, model: Json) -> int:
    if text == model.get("unk_token"):
        return int(TokenKind.UNKNOWN)
    is_byte = model.get("byte_fallback") and _BYTE_TOKEN.fullmatch(text)
    return int(TokenKind.BYTE if is_byte else TokenKind.NORMAL)


def _token_text(config: Json, key: str) -> str | None:
    """A text, or an object that has it as its content."""
    value = config.get(key)
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _ends(stated: Json) -> tuple[str, str]:
    """The tokens that the file's template puts before and after a text; nothing for none."""
    before, after = "", ""
    for step in _steps(stated.get("post_processor"), "processors"):
        kind = step.get("type")
        if kind == "TemplateProcessing":
            before, after = _template_ends(step)
        elif kind != "ByteLevel":  # which only moves offsets
            raise CheckpointError(f"the model's tokenizer.json has a post_processor {kind!r}, which is not known here")
    return before, after


def _template_ends(step: Json) -> tuple[str, str]:
    single = step.get("single")
    items: list[Any] = single if isinstance(single, list) else []
    names = [_special_name(each) for each in items]
    if names.count(None) != 1 or len(names) > 3:  # noqa: PLR2004  # one token, the text, one token
        raise CheckpointError("the model's tokenizer.json puts more than one token before or after a text")
    at = names.index(None)
    if at > 1 or len(names) - at > 2:  # noqa: PLR2004  # as above
        raise CheckpointError("the model's tokenizer.json puts more than one token before or after a text")
    return "".join(filter(None, names[:at])), "".join(filter(None, names[at + 1 :]))


def _special_name(item: Any) -> str | None:
    special = item.get("SpecialToken") if isinstance(item, dict) else None
    return str(special.get("id")) if isinstance(special, dict) else None


def _steps(stated: Any, key: str) -> Iterator[Json]:
    """The steps of a pipeline, which may be one, or several in a sequence."""
    if not isinstance(stated, dict):
        return
    if stated.get("type") == "Sequence":
        for each in stated.get(key) or []:
            yield from _steps(each, key)
    else:
        yield stated


def _hidden(vocabulary: Vocabulary, words: set[str]) -> set[str]:
    """Markup, which no text may yield, but for what merges need."""
    unknown = {vocabulary.texts[i] for i in (vocabulary.unknown_id,) if i is not None}
    return {vocabulary.texts[i] for i, kind in enumerate(vocabulary.kinds) if kind in MARKUP_KINDS} - words - unknown


def _merger(stated: Json, model: Json, left: list[_Added], hidden: set[str]) -> HubMerger:
    """The library numbers an added token itself, unless its text is in the vocabulary."""
    merged = {text: token_id for text, token_id in model["vocab"].items() if text not in hidden}
    merged |= {each.content: each.id for each in left}
    kept = [{"single_word": False, **msgspec.to_builtins(each)} for each in left]
    bare = stated | {"model": model | {"vocab": merged}, "added_tokens": kept}
    bare |= {"post_processor": None, "decoder": None, "truncation": None, "padding": None}
    decoders = [each.get("type") for each in _steps(stated.get("decoder"), "decoders")]
    return HubMerger(_libraries(bare), is_byte_level="ByteLevel" in decoders)


def _libraries(stated: Json) -> dict[Before, Tokenizer]:
    """One for each place, which most files make no difference between: vocabularies are large."""
    ways = {Before.NOTHING: stated, Before.MARKUP: _after_markup(stated), Before.TEXT: _within(stated)}
    made: list[tuple[Json, Tokenizer]] = []
    for way in ways.values():
        if not any(way == known for known, _ in made):
            made.append((way, _library(way)))
    return {place: next(each for known, each in made if known == way) for place, way in ways.items()}


def _after_markup(stated: Json) -> Json:
    """SentencePiece's newer way puts its space before the first text alone."""
    return stated | {"pre_tokenizer": _changed(stated.get("pre_tokenizer"), "pretokenizers", _spaced_first_alone)}


def _within(stated: Json) -> Json:
    """Where a text goes on there is no space but its own."""
    changed = {"pre_tokenizer": _changed(stated.get("pre_tokenizer"), "pretokenizers", _without_space)}
    return stated | changed | {"normalizer": _changed(stated.get("normalizer"), "normalizers", _without_space)}


def _spaced_first_alone(step: Json) -> Json:
    return step | {"prepend_scheme": "never"} if step.get("prepend_scheme") == "first" else step


def _without_space(step: Json) -> Json:
    match step.get("type"):
        case "Metaspace":
            known = {"prepend_scheme": "never", "add_prefix_space": False}
            return step | {key: value for key, value in known.items() if key in step}
        case "ByteLevel":
            return step | {"add_prefix_space": False}
        case "Prepend":
            return {"type": "Sequence", "normalizers": []}
        case _:
            return step


def _changed(stated: Any, key: str, change: Callable[[Json], Json]) -> Any:
    """A pipeline with each of its steps changed."""
    if not isinstance(stated, dict):
        return stated
    steps = stated.get(key)
    if stated.get("type") == "Sequence" and isinstance(steps, list):
        return stated | {key: [_changed(each, key, change) for each in steps]}
    return change(stated)


def _library(stated: Json) -> Tokenizer:
    try:
        return Tokenizer.from_str(msgspec.json.encode(stated).decode())
    except Exception as error:  # noqa: BLE001  # the library raises nothing narrower
        raise CheckpointError(f"the model's tokenizer.json can't be used: {error}") from None
