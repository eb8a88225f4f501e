"""The model was trained on certain token ids; any others for the same text make its answers worse, silently."""

import http.client
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from odd_strings import odd_strings

from covey.checkpoints.checkpoint import Checkpoint, CheckpointError
from covey.checkpoints.gguf_file import read_header
from covey.checkpoints.mergers import _BYTE_OF
from covey.checkpoints.pretokenizers import SPLITTERS, pre_tokenizer
from covey.checkpoints.tokenizer import TextPart, TextTokenizer, load_tokenizer

STRINGS = 10_000


@pytest.fixture(scope="module")
def demo_header(demo_model: Path) -> Checkpoint:
    return read_header(demo_model)


@pytest.fixture(scope="module")
def demo(demo_header: Checkpoint) -> TextTokenizer:
    return load_tokenizer(demo_header)


@pytest.fixture(scope="module")
def llama_cpp(demo_model: Path) -> Iterator[Callable[..., Any]]:
    """Asks llama.cpp's server, in this process."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(demo_model)
    parameters.n_ctx = 64
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.warmup = False
    parameters.verbosity = 0
    parameters.port = 0
    parameters.cpuparams.n_threads = 1
    server = xllamacpp.Server(parameters)
    address = server.listening_address.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=60)

    def ask(path: str, **question: Any) -> Any:
        connection.request("POST", path, json.dumps(question), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        assert answer.status == 200, content
        return json.loads(content)

    yield ask
    connection.close()
    del server


def test_the_tokens_are_those_of_llama_cpp(demo: TextTokenizer, llama_cpp: Callable[..., Any]) -> None:
    differing: list[str] = []
    for number, text in enumerate(odd_strings(STRINGS, seed=2)):
        how = {"parse_special": number % 2 == 0, "add_special": number % 3 == 0}
        if demo.encode(text, **how) != llama_cpp("/tokenize", content=text, **how)["tokens"]:
            differing.append(ascii(text))
    assert not differing, f"{len(differing)} of {STRINGS}, for example {differing[:3]}"


def test_text_comes_back_as_it_was(demo: TextTokenizer, llama_cpp: Callable[..., Any]) -> None:
    lost = {byte for byte in range(256) if chr_of(byte) not in demo._vocabulary.ids}
    for text in odd_strings(1000, seed=4):
        ids = demo.encode(text, parse_special=False, add_special=False)
        if not lost.intersection(text.encode()):
            assert demo.decode(ids) == text
    ids = demo.encode("naïve 👩‍💻", parse_special=False, add_special=False)
    assert llama_cpp("/detokenize", tokens=ids)["content"] == demo.decode(ids)


def chr_of(byte: int) -> str:
    return next(character for character, value in _BYTE_OF.items() if value == byte)


def test_the_demo_models_tokenizer(demo: TextTokenizer) -> None:
    assert (demo.vocabulary_size, demo.bos, demo.eos) == (49152, "<|im_start|>", "<|im_end|>")
    assert demo.stop_token_ids == {0, 2, 4}  # end of text, end of a turn, and <reponame>, which begins the next file
    assert demo.chat_template is not None
    assert "<|im_start|>" in demo.chat_template
    assert demo.token_bytes(2) == b""
    assert demo.token_bytes(60_000) == b""  # a row that only rounds the vocabulary up


# ---- what a user types is no markup ----


def test_only_markup_becomes_control_tokens(demo: TextTokenizer) -> None:
    end = "<|im_end|>"
    assert demo.encode_chat([TextPart(end, is_markup=True)]) == [2]
    assert 2 not in demo.encode_chat([TextPart(end, is_markup=False)])
    assert 2 not in demo.encode_chat([("<", False), ("|im_end|>", True)])
    assert 2 not in demo.encode_chat([("<|im_", True), ("end|>", False)])
    assert demo.encode_chat([("<|im_", True), ("end|>", True)]) == [2]
    assert demo.encode_chat([("<" + end, False), (end, True), (end, False)]).count(2) == 1


def test_words_reach_over_parts(demo: TextTokenizer) -> None:
    whole = demo.encode("Hello world", parse_special=False, add_special=False)
    assert demo.encode_chat([("Hel", True), ("lo ", False), ("world", True)]) == whole


def test_control_positions_may_overlap() -> None:
    tokenizer = load_tokenizer(small_header(tokens=["ab", "bc", "c"], types=[3, 3, 1]))
    assert tokenizer.control_positions("xabcab") == [1, 2, 4]


def test_half_a_surrogate_pair_becomes_a_replacement_character(demo: TextTokenizer) -> None:
    def encode(text: str) -> list[int]:
        return demo.encode(text, parse_special=True, add_special=False)

    assert encode("a\ud83db") == encode("a\ufffdb")
    assert encode("\ud83d\ude00") == encode("😀")


# ---- small vocabularies of our own ----


def small_header(
    *, tokens: list[str], types: list[int] | None = None, merges: list[str] | None = None, **more: Any
) -> Checkpoint:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types or [1] * len(tokens),
        "tokenizer.ggml.merges": merges or [f"{tokens[-1]} {tokens[-1]}"],
    } | {"tokenizer.ggml." + key: value for key, value in more.items()}
    if merges is None:
        metadata["tokenizer.ggml.tokens"] = [*tokens, tokens[-1] * 2]
        metadata["tokenizer.ggml.token_type"] = [*(types or [1] * len(tokens)), 1]
    return Checkpoint(metadata=metadata, tensors={}, file_bytes=0)


def encode(header: Checkpoint, text: str, *, parse_special: bool = True, add_special: bool = False) -> list[int]:
    return load_tokenizer(header).encode(text, parse_special=parse_special, add_special=add_special)


def test_merges_go_by_rank_and_a_missing_byte_keeps_its_neighbours_apart() -> None:
    header = small_header(tokens=["a", "b", "ab", "aab"], merges=["a b", "a ab"])
    assert encode(header, "aab") == [3]
    assert encode(header, "aba") == [2, 0]
    assert encode(header, "a-b") == [0, 1]  # "-" is no token


def test_user_defined_tokens_are_taken_from_anyone() -> None:
    header = small_header(tokens=["<t>", "<t", ">", "a"], types=[4, 3, 1, 1])
    assert encode(header, "a<t>", parse_special=False) == [3, 0]
    assert load_tokenizer(header).token_bytes(0) == b"<t>"
    shorter = small_header(tokens=["<t>", "<t", ">", "a"], types=[3, 4, 1, 1])
    assert encode(shorter, "a<t>", parse_special=False) == [3, 1, 2]
    assert encode(shorter, "a<t>") == [3, 0]


def test_tokens_before_and_after_a_text() -> None:
    header = small_header(
        tokens=["<s>", "</s>", "a"],
        types=[3, 3, 1],
        bos_token_id=0,
        eos_token_id=1,
        add_bos_token=True,
        add_eos_token=True,
    )
    assert encode(header, "a", add_special=True) == [0, 2, 1]
    assert encode(header, "a") == [2]
    tokenizer = load_tokenizer(header)
    assert tokenizer.encode_chat([("a", True)]) == [0, 2]
    assert tokenizer.encode_chat([("<s>a", True)]) == [0, 2]


def test_tokens_that_merging_makes_are_words_however_they_look() -> None:
    header = small_header(
        tokens=["<", "/", "s", ">", "</", "</s", "</s>"], merges=["< /", "</ s", "</s >"], pre="default"
    )
    assert load_tokenizer(header).stop_token_ids == frozenset()
    fixed = small_header(tokens=["a", "</s>", "<|im_end|>", "b"])
    assert load_tokenizer(fixed).stop_token_ids == {1, 2}


def test_gpt_oss_only_ends_a_channel_with_its_end() -> None:
    tokens = ["a", "<|end|>", "<|return|>", "<|call|>", "<|channel|>", "b"]
    tokenizer = load_tokenizer(small_header(tokens=tokens, types=[1, 3, 3, 3, 3, 1]))
    assert tokenizer.stop_token_ids == {2, 3}
    assert tokenizer.token_bytes(4) == b"<|channel|>"


def sentence_piece_header() -> Checkpoint:
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "h",
        "i",
        "\u2581h",
        "\u2581hi",
        "hi",
    ]
    scores = [0.0] * 259 + [-10.0, -11.0, -12.0, -1.0, -2.0, -3.0]
    return Checkpoint(
        metadata={
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 6],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
        },
        tensors={},
        file_bytes=0,
    )


def test_sentence_piece_merges_by_score_and_falls_back_to_bytes() -> None:
    tokenizer = load_tokenizer(sentence_piece_header())
    ids = tokenizer.encode("hi é</s>hi", parse_special=True, add_special=True)
    assert ids == [1, 263, 259, 3 + 0xC3, 3 + 0xA9, 2, 263]  # a space before the text, and again after markup
    assert tokenizer.decode(ids) == " hi é hi"


def test_a_text_that_goes_on_gets_no_space_and_tokens_have_names() -> None:
    """What a grammar forces comes in the middle of an answer; log probabilities name tokens that are no text."""
    tokenizer = load_tokenizer(sentence_piece_header())
    assert tokenizer.encode_within("hi") == [264]
    assert tokenizer.encode_within("</s>") != [2]
    named = [tokenizer.token_text(token_id) for token_id in (2, 264, 3 + 0xC3, 9999)]
    assert named == ["</s>", "hi", "\ufffd", ""]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": "bert"}, "'bert'"),
        ({"model": 7}, "'tokenizer.ggml.model'"),
        ({"pre": "novel"}, "'novel'"),
        ({"tokens": []}, "'tokenizer.ggml.tokens'"),
        ({"tokens": [1, 2]}, "'tokenizer.ggml.tokens'"),
        ({"token_type": [1]}, "'tokenizer.ggml.token_type'"),
        ({"merges": ["ab"]}, "'tokenizer.ggml.merges'"),
        ({"merges": ["a z"]}, "merges don't fit its tokens"),
        ({"eos_token_id": 5}, "'tokenizer.ggml.eos_token_id'"),
        ({"eos_token_id": -1}, "'tokenizer.ggml.eos_token_id'"),
        ({"add_bos_token": 1}, "'tokenizer.ggml.add_bos_token'"),
    ],
)
def test_damage_is_named(changed: dict[str, Any], said: str) -> None:
    header = small_header(tokens=["a", "b", "ab"], types=[1, 1, 1], merges=["a b"])
    header.metadata.update({"tokenizer.ggml." + key: value for key, value in changed.items()})
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(header)
    assert said in str(caught.value)


def test_a_file_without_a_vocabulary_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.model"):
        load_tokenizer(Checkpoint(metadata={}, tensors={}, file_bytes=0))


# ---- how words are cut, by family: from llama.cpp's own splitters ----


def words(family: str, text: str) -> list[str]:
    pieces = pre_tokenizer(SPLITTERS[family]).pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in pieces]


@pytest.mark.parametrize(
    ("family", "text", "expected"),
    [
        ("gpt-2", "It's 2024  ok", ["It", "'s", " 2024", " ", " ok"]),
        ("smollm", "It's 2024", ["It", "'s", " ", "2", "0", "2", "4"]),
        ("llama-bpe", "IT'S 12345\n\n x", ["IT", "'S", " ", "123", "45", "\n\n", " x"]),
        ("qwen2", "a.b 123", ["a", ".b", " ", "1", "2", "3"]),
        ("qwen35", "हिन्दी!", ["हिन्दी", "!"]),
        ("deepseek-v3", "漢字kana 1234", ["漢字", "kana", " ", "123", "4"]),
        ("gpt-4o", "ПриветМир camelCase", ["Привет", "Мир", " camel", "Case"]),
        ("tekken", "HTTPServer 12", ["HTTPServer", " ", "1", "2"]),
        ("default", "a+b 1234", ["a", "+", "b", " ", "123", "4"]),
        ("falcon", "a+b 1234", ["a", "+", "b", " ", "123", "4"]),
        ("deepseek-coder", "ab\n12", ["ab", "\n", "1", "2"]),
    ],
)
def test_words(family: str, text: str, expected: list[str]) -> None:
    assert words(family, text) == expected


@pytest.mark.parametrize("family", sorted(SPLITTERS))
def test_no_family_loses_text(family: str) -> None:
    for text in odd_strings(50, seed=5):
        assert "".join(words(family, text)) == text


def test_characters_that_are_newer_than_llama_cpp_are_no_letters() -> None:
    assert words("smollm", "a\u1c89") == ["a", "\u1c89"]
    assert words("smollm", "a\u1c88") == ["a\u1c88"]


def test_the_header_alone_is_enough(demo_model: Path, demo: TextTokenizer, tmp_path: Path) -> None:
    """A file whose tensors are cut to nothing but room gives the same tokenizer: no tensor is read."""
    start = min(tensor.offset for tensor in read_header(demo_model).tensors.values())
    copy = tmp_path / "header.gguf"
    with demo_model.open("rb") as source, copy.open("wb") as target:
        target.write(source.read(start))
        target.truncate(demo_model.stat().st_size)
    other = load_tokenizer(read_header(copy))
    assert other.encode("Hello", parse_special=True, add_special=True) == demo.encode(
        "Hello", parse_special=True, add_special=True
    )
