"""Strings that tokenizers stumble over: the same for the same seed."""

import random
from collections.abc import Iterator

# Code points that Unicode 16 has and 15.1 has not, and neighbours: where tables of categories differ in age.
NEW = (
    "\u1c89\u1c8a\ua7cb\ua7da\U000105c0\U00010d40\U00010d4a\U000116d0\U00011bf0\U00013460\U00016d70\U0001e5d0\U0001ccf0"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<file_sep>", "<|im_", "|>", "<", "<|")
ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "0123456789",
    "٠١٢٣٤٥६७८९๑๒๓৪৫߁߂０１２³²½Ⅷ㊷𝟘𝟙",
    " \t\n\r\v\f\u00a0\u0085\u2003\u3000\u2028\u1680",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~¡¿§«»‘’“”…、。！",
    "éüñçßøåÆŒſKİıẞΑΩабвЖЯіїԱբ",
    "日本語漢字中文汉字ひらがなカタカナ𠀀𪚥豈",
    "한국어각ᄀ까ᅢᆨᆩㄱㅏ",
    "שלוםעברית\u05b0\u05b4العربيةمرحبا\u064b\u064e\u200f\u202eفارسی",
    "हिन्दी\u093c\u094dবাংলা\u09bcไทยสวัสดี\u0e49ကမြန်မာ\u1039",
    "e\u0301a\u0308o\u0302\u0327\u20dd\u0489\ufe0f\U0001d165",
    "👩🏽‍💻👨‍👩‍👧‍👦🇫🇷🏳️‍🌈😀🫠❤️\u200d\U000e0067\U0001f3fb",
    "\x00\x01\x07\x08\x1b\x7f\x80\x9f\u00ad\u200b\u200c\u200d\u2060\ufeff\ufffd\ufffe\ufdd0",
    "\ue000\uf8ff\U000f0000\U0010fffd",
    "\u0378\u0530\u2fe0\U0001fbff\U000e0fff\U0003ffff\U0010ffff" + NEW,
    "∑∫√≠≤∞₿€£¥©®™°±×÷←→⇒♠♫🜀𝔸𝒷",
)
SHORTENED = (
    "'s",
    "'S",
    "'t",
    "'T",
    "'re",
    "'RE",
    "'Re",
    "'ve",
    "'VE",
    "'m",
    "'ll",
    "'LL",
    "'lL",
    "'d",
    "'D",
    "'ſ",
    "’s",
)
WORDS = ("it", "we", "Hello", "WORLD", "don", "I", "naïve", "the", "x", "")


def odd_strings(count: int, seed: int) -> Iterator[str]:
    draw = random.Random(seed)
    yield ""
    for _ in range(count - 1):
        yield "".join(_piece(draw) for _ in range(draw.randint(1, 8)))


def _piece(draw: random.Random) -> str:
    kinds = (_shortened, _repeated, _special, _any_characters, _whole_alphabet, _word, *[_of_one_alphabet] * 4)
    return draw.choice(kinds)(draw)


def _shortened(draw: random.Random) -> str:
    return draw.choice(WORDS) + draw.choice(SHORTENED) + draw.choice(("", " ", "e", "1"))


def _repeated(draw: random.Random) -> str:
    return draw.choice(" \n\t\r\u00a0\u3000") * draw.choice((1, 2, 3, 4, 7, 8, 16, 40))


def _special(draw: random.Random) -> str:
    return draw.choice(SPECIAL)


def _any_characters(draw: random.Random) -> str:
    return "".join(_character(draw) for _ in range(draw.randint(1, 6)))


def _whole_alphabet(draw: random.Random) -> str:
    """In its order: sequences joined to one picture, syllables, stacked marks."""
    return draw.choice(ALPHABETS)


def _word(draw: random.Random) -> str:
    return " " + draw.choice(WORDS)


def _of_one_alphabet(draw: random.Random) -> str:
    letters = draw.choice(ALPHABETS)
    return "".join(draw.choice(letters) for _ in range(draw.randint(1, 9)))


def _character(draw: random.Random) -> str:
    """Any code point but half a surrogate pair; low ones as often as high ones."""
    end = draw.choice((0x80, 0x800, 0x3000, 0x10000, 0x20000, 0x110000))
    point = draw.randrange(end)
    return chr(point) if not 0xD800 <= point < 0xE000 else "\ufffd"
