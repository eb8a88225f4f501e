"""A stream never shows half a character, and what it shows adds up to the whole text."""

from hypothesis import given
from hypothesis import strategies as st

from covey.text.detokenize import IncrementalDecoder

PIECES = st.lists(st.binary(max_size=4) | st.text(max_size=2).map(str.encode), max_size=20)


def decoder_of(pieces: list[bytes]) -> IncrementalDecoder:
    return IncrementalDecoder(lambda token_id: pieces[token_id])


@given(PIECES)
def test_the_pieces_add_up_to_the_whole(pieces: list[bytes]) -> None:
    decoder = decoder_of(pieces)
    shown = [decoder.push(token_id) for token_id in range(len(pieces))]
    assert "".join([*shown, decoder.finish()]) == b"".join(pieces).decode("utf-8", "replace")


@given(st.text(max_size=20), st.integers(1, 3))
def test_whole_characters_only(text: str, size: int) -> None:
    content = text.encode()
    decoder = decoder_of([content[at : at + size] for at in range(0, len(content), size)])
    shown = ""
    for at in range(0, len(content), size):
        shown += decoder.push(at // size)
        assert text.startswith(shown)
        assert len(shown.encode()) > at + size - 4  # never more than an incomplete character behind
    assert shown == text
    assert decoder.finish() == ""


def test_a_character_that_is_never_completed() -> None:
    decoder = decoder_of(["👩".encode()[:3], b"", b"a"])
    assert [decoder.push(0), decoder.push(1), decoder.finish()] == ["", "", "\ufffd"]
    decoder = decoder_of(["👩".encode()[:3], b"", b"a"])
    assert [decoder.push(0), decoder.push(2), decoder.finish()] == ["", "\ufffda", ""]
