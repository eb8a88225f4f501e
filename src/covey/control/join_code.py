"""The join code as people see it: 128 random bits, written so that they can be read out, typed and checked.

26 characters of Crockford's base32 (no I, L, O, U: https://www.crockford.com/base32.html) carry the bits, the highest
first; a 27th checks them. It is the sum of the others over GF(32), each times its own power of a generator, so that
any one wrong character and any two that changed places are found. Crockford's own check character is not used: it
takes five more symbols, most of which mean something to a shell.
"""

from typing import Final

from msgspec import Struct

ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
BITS: Final = 5  # of one character
SECRET_BYTES: Final = 16
CHARACTERS: Final = 26  # 130 bits: the first character is 7 at most
GROUP: Final = 4
POLYNOMIAL: Final = 0b100101  # x^5 + x^2 + 1 is primitive: the powers of x are all 31 elements but zero
_LOOKALIKES: Final = str.maketrans("OIL", "011", " -\t\r\n")


class JoinCodeError(Exception):
    """What was typed is no join code; the message is one sentence, without the code."""


class JoinCode(Struct, frozen=True):
    """Who holds it is a member. It shows itself only when asked by `text`, so that no log or error does."""

    secret: bytes  # 16

    def __repr__(self) -> str:
        return "JoinCode(…)"

    def text(self) -> str:
        """As people see it: "0123-4567-89AB-CDEF-GHJK-MNPQ-RST"."""
        number = int.from_bytes(self.secret, "big")
        digits = [number >> BITS * place & (1 << BITS) - 1 for place in reversed(range(CHARACTERS))]
        characters = "".join(ALPHABET[digit] for digit in [*digits, _check(digits)])
        return "-".join(characters[start : start + GROUP] for start in range(0, CHARACTERS + 1, GROUP))


def parse(typed: str) -> JoinCode:
    """What a person typed: in either case, with spaces or hyphens anywhere, O for 0, I or L for 1.

    Raises `JoinCodeError`.
    """
    characters = typed.upper().translate(_LOOKALIKES)
    strange = next((character for character in characters if character not in ALPHABET), None)
    if strange is not None:
        raise JoinCodeError(f"this is no join code: codes have no {strange!r}; copy it again from `covey join-code`")
    if len(characters) != CHARACTERS + 1:
        raise JoinCodeError(
            f"the join code is incomplete: it has {CHARACTERS + 1} characters, and here are {len(characters)}"
            if len(characters) <= CHARACTERS
            else f"the join code is too long: it has {CHARACTERS + 1} characters, and here are {len(characters)}"
        )
    *digits, check = (ALPHABET.index(character) for character in characters)
    number = sum(digit << BITS * place for place, digit in enumerate(reversed(digits)))
    if check != _check(digits) or number >> 8 * SECRET_BYTES:
        raise JoinCodeError("the join code is mistyped: the last character does not fit the others; compare them")
    return JoinCode(number.to_bytes(SECRET_BYTES, "big"))


def _check(digits: list[int]) -> int:
    """By Horner's rule: the first digit is multiplied most often, the last one once."""
    total = 0
    for digit in digits:
        total = _double(total ^ digit)
    return total


def _double(element: int) -> int:
    doubled = element << 1
    return doubled ^ POLYNOMIAL if doubled >> BITS else doubled
