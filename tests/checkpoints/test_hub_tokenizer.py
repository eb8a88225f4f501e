"""A folder's tokenizer.json: the same ids as the `tokenizers` library gives, and typed control tokens are text."""

import json
from pathlib import Path
from typing import Any

import pytest
from hub_folders import LLAMA, llama_tensors, write_folder
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from covey.checkpoints.checkpoint import CheckpointError
from covey.checkpoints.opening import open_checkpoint
from covey.checkpoints.tokenizer import TextTokenizer, load_tokenizer, token_texts

CORPUS = [
    "It's a fine day, isn't it?",
    "The day the cat sat on the mat; the mat was fine.",
    "été grüße 日本語 fine fine",
]
TEXTS = [
    "", "The cat", " the  mat\n\nfine", "<s>The cat</s> sat", "a<|end|> \n b", "été 日本語 \U0001f600",
    "<tool> x <tool>", "  leading", "<s> <s>", "fine<|end|>  <|end|>fine",
]  # fmt: skip
SPECIAL = ["<s>", "</s>", AddedToken("<|end|>", rstrip=True, special=True)]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentence_piece(way: str) -> Tokenizer:
    """`way`: "prepend" as Llama 2's files have it, else how Metaspace prepends."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))  # noqa: S106 (no password)
    if way == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", way, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([text.replace(" ", "▁") for text in CORPUS], trainer)
    stated = json.loads(tokenizer.to_str())
    stated["added_tokens"] = stated["added_tokens"][:3]  # bytes are no added tokens
    return Tokenizer.from_str(json.dumps(stated))


def finished(tokenizer: Tokenizer, *, with_bos: bool = True) -> Tokenizer:
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(["<tool>"])
    if with_bos:
        bos = ("<s>", tokenizer.token_to_id("<s>"))
        template = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[bos])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def folder(path: Path, tokenizer: str | None, config: dict[str, Any] | None = None, **settings: Any) -> Path:
    write_folder(path, LLAMA | settings, llama_tensors())
    if tokenizer is not None:
        (path / "tokenizer.json").write_text(tokenizer)
    (path / "tokenizer_config.json").write_text(json.dumps(config or {}))
    return path


def loaded(path: Path) -> TextTokenizer:
    return load_tokenizer(open_checkpoint(path))


@pytest.mark.parametrize("way", ["bytes", "prepend", "first", "always", "never"])
@pytest.mark.parametrize("with_bos", [True, False])
def test_the_same_ids_and_the_same_text_as_the_library(way, with_bos, tmp_path):
    reference = finished(byte_level() if way == "bytes" else sentence_piece(way), with_bos=with_bos)
    ours = loaded(folder(tmp_path / "model", reference.to_str(), {"eos_token": "</s>"}))
    for text in TEXTS:
        ids = reference.encode(text).ids
        assert ours.encode(text, parse_special=True, add_special=True) == ids, text
        shown = [each for each in ids if reference.id_to_token(each) not in {"<s>", "</s>", "<|end|>", "<unk>"}]
        if "<tool>" not in text or way != "prepend":  # there the library shows a space that it had put before the token
            assert ours.decode(ids) == reference.decode(shown, skip_special_tokens=False), text
    assert ours.eos == "</s>"
    assert ours.bos == ("<s>" if with_bos else "")


def test_the_texts_of_its_tokens_are_those_of_the_library(tmp_path):
    reference = finished(byte_level())
    path = folder(tmp_path / "model", reference.to_str(), {"eos_token": "</s>"})
    known = [reference.id_to_token(token_id) for token_id in range(reference.get_vocab_size())]
    assert token_texts(open_checkpoint(path)) == known


@pytest.mark.parametrize("way", ["bytes", "prepend"])
def test_typed_markup_is_plain_text(way, tmp_path):
    reference = finished(byte_level() if way == "bytes" else sentence_piece(way))
    ours = loaded(folder(tmp_path / "model", reference.to_str()))
    ids = ours.encode("a</s>b <|end|> c", parse_special=False, add_special=False)
    assert not set(ids) & {reference.token_to_id(text) for text in ("<s>", "</s>", "<|end|>")}
    assert ours.decode(ids).strip() == "a</s>b <|end|> c"


@pytest.mark.parametrize("way", ["bytes", "prepend", "first", "always", "never"])
def test_a_text_that_goes_on_gets_no_space(way, tmp_path):
    """What a grammar forces comes in the middle of an answer."""
    ours = loaded(
        folder(tmp_path / "model", finished(byte_level() if way == "bytes" else sentence_piece(way)).to_str())
    )
    for text in ("fine", " fine", "the mat"):
        assert ours.decode(ours.encode_within(text)) == text


def test_what_ends_a_generation(tmp_path):
    reference = finished(byte_level())
    path = folder(tmp_path / "model", reference.to_str(), {"eos_token": {"content": "</s>"}}, eos_token_id=7)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9]}))
    ends = {reference.token_to_id("</s>"), reference.token_to_id("<|end|>")}
    assert loaded(path).stop_token_ids == ends | {5, 9}
    (path / "generation_config.json").unlink()
    assert loaded(path).stop_token_ids == ends | {7}
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 5000}))
    with pytest.raises(CheckpointError, match=r"eos_token_id is .5000., but it has"):
        loaded(path)


def test_where_a_chat_template_may_stand(tmp_path):
    path = folder(tmp_path / "model", finished(byte_level()).to_str())
    assert loaded(path).chat_template is None
    settings = path / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": "one"}))
    assert loaded(path).chat_template == "one"
    named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    settings.write_text(json.dumps({"chat_template": named}))
    assert loaded(path).chat_template == "three"
    (path / "chat_template.jinja").write_text("four")
    assert loaded(path).chat_template == "four"
    (path / "chat_template.jinja").unlink()
    settings.write_text(json.dumps({"chat_template": 5}))
    with pytest.raises(CheckpointError, match="chat template is no text"):
        loaded(path)


def broken(**changed: Any) -> str:
    return json.dumps(json.loads(finished(byte_level()).to_str()) | changed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no tokenizer.json"),
        ("{", "is no JSON"),
        ("[]", "holds no JSON object"),
        (
            broken(model={"type": "Unigram", "vocab": []}),
            "of the type 'Unigram', which is not known here; known is BPE",
        ),
        (broken(model=None), "of the type None"),
        (broken(model={"type": "BPE", "vocab": {"a": -1}, "merges": []}), "does not give each token a number"),
        (broken(model={"type": "BPE", "vocab": {"a": 1 << 60}, "merges": []}), "does not give each token a number"),
        (broken(model={"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}), "an entry of its merges is no pair"),
        (broken(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}), "tokenizer.json can't be used"),
        (broken(added_tokens=[{"id": "x", "content": "y"}]), "its added_tokens"),
        (broken(added_tokens=[{"id": 1 << 60, "content": "y"}]), "its added_tokens have numbers"),
        (broken(post_processor={"type": "BertProcessing"}), "post_processor 'BertProcessing'"),
        (broken(pre_tokenizer={"type": "Odd"}), "tokenizer.json can't be used"),
    ],
)
def test_a_tokenizer_that_can_not_be_used(content, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        loaded(folder(tmp_path / "model", content))
