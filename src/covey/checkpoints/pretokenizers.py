r"""How each family of byte-level BPE vocabularies cuts text into words before it merges bytes.

GGUF names the way in `tokenizer.ggml.pre`. The expressions are facts about how models were trained, as published in
their tokenizer.json and in llama.cpp (src/llama-vocab.cpp, src/unicode.cpp), which is our yardstick: the same text
must give the same tokens. Two things differ between the regex engines, and are settled here:

* Unicode grows, and the regex engine inside `tokenizers` (Oniguruma) knows Unicode 16 where llama.cpp knows 15.1.
  Characters that are new in 16 are therefore taken out of every category, as if still unassigned.
* Letters after an apostrophe ('S) are listed rather than matched without regard to case, since Unicode's case folding
  would also take the long s.
"""

from typing import Final

from msgspec import Struct
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split

# Code points assigned by Unicode 16 (September 2024).
_NEW_IN_UNICODE_16: Final = (
    (0x897, 0x897), (0x1B4E, 0x1B4F), (0x1B7F, 0x1B7F), (0x1C89, 0x1C8A), (0x2427, 0x2429), (0x31E4, 0x31E5),
    (0xA7CB, 0xA7CD), (0xA7DA, 0xA7DC), (0x105C0, 0x105F3), (0x10D40, 0x10D65), (0x10D69, 0x10D85),
    (0x10D8E, 0x10D8F), (0x10EC2, 0x10EC4), (0x10EFC, 0x10EFC), (0x11380, 0x113E2), (0x116D0, 0x116E3),
    (0x11BC0, 0x11BE1), (0x11BF0, 0x11BF9), (0x11F5A, 0x11F5A), (0x13460, 0x143FA), (0x16100, 0x16139),
    (0x16D40, 0x16D79), (0x18CFF, 0x18CFF), (0x1CC00, 0x1CCF9), (0x1CD00, 0x1CEB3), (0x1E5D0, 0x1E5FA),
    (0x1E5FF, 0x1E5FF), (0x1F8B2, 0x1F8BB), (0x1F8C0, 0x1F8C1), (0x1FA89, 0x1FA89), (0x1FA8F, 0x1FA8F),
    (0x1FABE, 0x1FABE), (0x1FAC6, 0x1FAC6), (0x1FADC, 0x1FADC), (0x1FADF, 0x1FADF), (0x1FAE9, 0x1FAE9),
    (0x1FBCB, 0x1FBEF),
)  # fmt: skip


def _without_new(category: str) -> str:
    new = "".join(rf"\x{{{first:X}}}-\x{{{last:X}}}" for first, last in _NEW_IN_UNICODE_16)
    return rf"[\p{{{category}}}&&[^{new}]]"


# What stands for {L} and so on in the expressions below. They may stand inside brackets, too.
_CATEGORIES: Final = {f"{{{category}}}": _without_new(category) for category in ("L", "N", "M", "P", "S")}
_SHORTENED: Final = "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"  # English: it's, we're
_ENDING: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?{L}+| ?{N}+| ?[^\s{L}{N}]+|\s+(?!\S)|\s+"
_LLAMA3: Final = rf"{_SHORTENED}|[^\r\n{{L}}{{N}}]?{{L}}+|{{N}}{{1,3}}| ?[^\s{{L}}{{N}}]+[\r\n]*|{_ENDING}"
_QWEN2: Final = rf"{_SHORTENED}|[^\r\n{{L}}{{N}}]?{{L}}+|{{N}}| ?[^\s{{L}}{{N}}]+[\r\n]*|{_ENDING}"
_QWEN35: Final = rf"{_SHORTENED}|[^\r\n{{L}}{{N}}]?[{{L}}{{M}}]+|{{N}}| ?[^\s{{L}}{{M}}{{N}}]+[\r\n]*|{_ENDING}"
_DEEPSEEK3: Final = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n{L}{P}{S}]?[{L}{M}]+"
    rf"| ?[{{P}}{{S}}]+[\r\n]*|{_ENDING}"
)
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}{M}]"


def _cased(digits: str, ending: str) -> str:
    """Words are also cut where lower case turns to upper; an English ending may belong to the word."""
    start = r"[^\r\n{L}{N}]?"
    return (
        rf"{start}{_UPPER}*{_LOWER}+{ending}|{start}{_UPPER}+{_LOWER}*{ending}"
        rf"|{digits}| ?[^\s{{L}}{{N}}]+[\r\n/]*|{_ENDING}"
    )


_TEKKEN: Final = _cased("{N}", "")
_GPT4O: Final = _cased("{N}{1,3}", f"(?:{_SHORTENED})?")


class WordSplitter(Struct, frozen=True):
    """The expressions are applied one after another, each to the pieces that the one before left."""

    patterns: tuple[str, ...]
    whole_words_first: bool = False  # a word that is a token is taken whole, whatever the merges say
    adds_bos: bool = False  # unless the file says otherwise


_SPLITTERS: Final[dict[WordSplitter, tuple[str, ...]]] = {
    WordSplitter((_GPT2,)): (
        "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "gigachat", "a.x-4.0",
        "mellum", "jina-es", "jina-de", "modern-bert",
    ),
    WordSplitter(("{N}", _GPT2)): (
        "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2",
    ),
    WordSplitter((_LLAMA3,), whole_words_first=True, adds_bos=True): (
        "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
    ),
    WordSplitter((_LLAMA3,), whole_words_first=True): ("glm4", "glm5"),
    WordSplitter((_LLAMA3,)): ("dbrx", "smaug-bpe", "chatglm-bpe"),
    WordSplitter((_QWEN2,)): (
        "qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez", "grok-2", "solar-open", "kormo",
    ),
    WordSplitter((_QWEN35,)): ("qwen35",),
    WordSplitter((r"{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK3)): ("deepseek-v3", "hunyuan-dense", "joyai-llm"),
    WordSplitter(("[\r\n]", r"\s?{L}+", r"\s?{P}+", "[一-龥ࠀ-一가-\ud7ff]+", "{N}")): ("deepseek-coder",),
    WordSplitter((r"[{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")): ("falcon",),
    WordSplitter((r"[{P}\$\+<=>\^~\|]+", _GPT2, "{N}+", "[0-9][0-9][0-9]")): ("default",),
    # llama.cpp knows no upper case beyond ASCII in these two; what the models were trained with does.
    WordSplitter((_TEKKEN,), whole_words_first=True, adds_bos=True): ("tekken",),
    WordSplitter((_GPT4O,)): ("gpt-4o", "llama4", "kanana2"),
}  # fmt: skip

SPLITTERS: Final[dict[str, WordSplitter]] = {name: each for each, names in _SPLITTERS.items() for name in names}


def pre_tokenizer(splitter: WordSplitter) -> PreTokenizer:
    """Cuts into words, then writes each byte as the printable character that stands for it in the vocabulary."""
    steps: list[PreTokenizer] = [Split(Regex(_spelt_out(each)), "isolated") for each in splitter.patterns]
    return Sequence([*steps, ByteLevel(add_prefix_space=False, use_regex=False)])


def _spelt_out(pattern: str) -> str:
    for name, characters in _CATEGORIES.items():
        pattern = pattern.replace(name, characters)
    return pattern
