"""Sealed messages open with the key, in their place, unchanged; or not at all."""

import pytest

from covey.effects.sealing import Seal, SealError

PLACE = "every/ada"


def test_there_and_back() -> None:
    sealed = Seal(bytes(32)).close(b"hello", PLACE)
    assert Seal(bytes(32)).open(sealed, PLACE) == b"hello"
    assert Seal(bytes(32)).close(b"hello", PLACE) != sealed


@pytest.mark.parametrize("place", ["every/bob", "to/bob/ada", ""])
def test_it_can_not_be_moved(place: str) -> None:
    with pytest.raises(SealError, match="not sealed"):
        Seal(bytes(32)).open(Seal(bytes(32)).close(b"hello", PLACE), place)


def test_another_key_and_every_changed_byte_are_refused() -> None:
    sealed = Seal(bytes(32)).close(b"hello", PLACE)
    broken = [sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :] for at in range(len(sealed))]
    for each in [*broken, b"", b"short", sealed[:-1], bytes(64)]:
        with pytest.raises(SealError):
            Seal(bytes(32)).open(each, PLACE)
    with pytest.raises(SealError):
        Seal(bytes([1] * 32)).open(sealed, PLACE)
