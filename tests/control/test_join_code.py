"""A code is read aloud, typed on another device, pasted with a line break: what is meant is taken, slips are found."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.control.join_code import ALPHABET, CHARACTERS, JoinCode, JoinCodeError, parse

codes = st.binary(min_size=16, max_size=16).map(JoinCode)
VECTORS = {  # computed apart, by multiplication in GF(32)
    "00000000000000000000000000000000": "0000-0000-0000-0000-0000-0000-000",
    "000102030405060708090a0b0c0d0e0f": "0004-1061-050R-3GG2-8A1C-60T3-GFZ",
    "ffffffffffffffffffffffffffffffff": "7ZZZ-ZZZZ-ZZZZ-ZZZZ-ZZZZ-ZZZZ-ZZC",
}


@pytest.mark.parametrize(("secret", "text"), VECTORS.items())
def test_vectors(secret: str, text: str) -> None:
    assert JoinCode(bytes.fromhex(secret)).text() == text
    assert parse(text).secret.hex() == secret


@given(codes)
def test_what_is_shown_can_be_typed(code: JoinCode) -> None:
    assert parse(code.text()) == code


@given(codes, st.data())
def test_how_it_is_typed_does_not_matter(code: JoinCode, data: st.DataObject) -> None:
    typed = ""
    for character in code.text().replace("-", ""):
        looks = {"0": "0Oo", "1": "1IiLl"}.get(character, character + character.lower())
        typed += data.draw(st.sampled_from(looks)) + data.draw(st.sampled_from(["", " ", "-", "\n"]))
    assert parse(typed) == code


@given(codes, st.integers(0, CHARACTERS), st.sampled_from(ALPHABET))
def test_any_wrong_character_is_found(code: JoinCode, place: int, wrong: str) -> None:
    characters = list(code.text().replace("-", ""))
    if characters[place] != wrong:
        characters[place] = wrong
        with pytest.raises(JoinCodeError, match="the last character does not fit"):
            parse("".join(characters))


@given(codes, st.integers(0, CHARACTERS), st.integers(0, CHARACTERS))
def test_any_two_that_changed_places_are_found(code: JoinCode, first: int, second: int) -> None:
    characters = list(code.text().replace("-", ""))
    if characters[first] != characters[second]:
        characters[first], characters[second] = characters[second], characters[first]
        with pytest.raises(JoinCodeError, match="mistyped: the last character does not fit"):
            parse("".join(characters))


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("", "incomplete: it has 27 characters, and here are 0"),
        ("0000-0000-0000-0000-0000-0000-00", "incomplete: it has 27 characters, and here are 26"),
        ("0000-0000-0000-0000-0000-0000-0000", "too long: it has 27 characters, and here are 28"),
        ("0000-0000-0000-U000-0000-0000-000", "codes have no 'U'"),
        ("covey up --join 0000-0000", "codes have no 'V'|codes have no 'U'"),
        ("GZZZ-ZZZZ-ZZZZ-ZZZZ-ZZZZ-ZZZZ-ZZZ", "mistyped"),
    ],
)
def test_each_mistake_has_its_sentence(typed: str, sentence: str) -> None:
    with pytest.raises(JoinCodeError, match=sentence):
        parse(typed)


@given(st.text())
def test_nonsense_is_refused(typed: str) -> None:
    with pytest.raises(JoinCodeError):
        parse(typed)


def test_a_code_does_not_show_itself() -> None:
    code = JoinCode(bytes(range(16)))
    assert code.text() not in f"{code!r} {code} {[code]}"
    assert "0001" not in f"{code!r}"
