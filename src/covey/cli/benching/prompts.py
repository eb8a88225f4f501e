"""Prompts of a given length that a person could read, and that no cache has seen.

How many tokens a word takes is the model's matter, so the server is asked twice, with few words and with more. The
words are so common that most vocabularies have each as one token: then every prompt has the length that was asked for.
"""

from collections.abc import Callable
from random import Random
from typing import Final

from msgspec import Struct

from covey.cli.client import CliError

SENTENCE_WORDS: Final = 9
FEW: Final = 8
MORE: Final = 40  # words; no more than these, for the context may be short
TEXT: Final = (
    "about after again air all also always and animal another answer any are around ask away back before begin "
    "better between big bird black blue boat body book both box boy bread bring brother build but call can car "
    "carry change child city clear close cold color come country cut dark day deep different do door down draw dry "
    "each early earth eat end enough even evening every eye face fall family far farm fast father feel few field "
    "find fire first fish five follow food foot for form found four friend from full game garden girl give go gold "
    "good grass great green ground group grow hand hard have head hear heart help here high hill hold home horse "
    "hot hour house how ice idea in island just keep kind king know land large last late laugh lead learn leave "
    "left letter life light like line list listen little live long look lost love low machine make man many map "
    "mark may mean milk mind miss money moon more morning most mother mountain move much music must name near need "
    "never new next night north nothing now number off often old on once one only open or order other our out over "
    "own page paper part people picture place plain plant play point power pull put question quick quiet rain read "
    "ready real red rest right river road rock room round run said same say school sea second see seem set seven "
    "she ship short should show side simple sing six sky sleep slow small snow so some song soon sound south space "
    "stand star start stay step still stone stop story street strong study such summer sun sure table take talk "
    "teach tell ten than that the their then there these thing think three through time together told too top town "
    "travel tree true turn two under until up use very voice wait walk wall want warm watch water way we well west "
    "what wheel when where while white who why wind window winter with woman wonder wood word work world would "
    "write year yellow yes you young"
)
WORDS: Final = TEXT.split()


class Tokens(Struct, frozen=True):
    """What the words of a model's prompt take: `template` for what stands around them, `per_word` for each."""

    template: float
    per_word: float

    def word_count(self, tokens: int) -> int:
        """Of a prompt of so many tokens. Raises `CliError` where the template alone takes them."""
        count = round((tokens - self.template) / self.per_word)
        if count < 1:
            least = round(self.template + self.per_word)
            raise CliError(
                f"A prompt of {tokens} tokens is too short: what the model's template writes around one word takes "
                f"{least}. Ask for {least} at least."
            )
        return count


class Prompts:
    """`seed` decides them; `shared_tokens` of each are the same words."""

    def __init__(self, seed: int, count_tokens: Callable[[str], int], shared_tokens: int = 0) -> None:
        """`count_tokens` asks how many tokens a prompt has. Raises `CliError`, as it may."""
        self._random = Random(seed)  # noqa: S311 (no secret)
        few, more = (count_tokens(self._words(count)) for count in (FEW, MORE))
        per_word = (more - few) / (MORE - FEW)
        if per_word <= 0:
            raise CliError("The server counts no tokens of a prompt, so none of a certain length can be made.")
        self.tokens = Tokens(few - FEW * per_word, per_word)
        self._shared_count = round(shared_tokens / per_word)
        self._shared = self._words(self._shared_count)

    def of(self, tokens: int) -> str:
        """The next one, of about so many tokens with all that the template adds. Raises `CliError`."""
        count = self.tokens.word_count(tokens) - self._shared_count
        if count < 1:
            raise CliError(f"The shared prefix leaves no room for anything else in a prompt of {tokens} tokens.")
        return f"{self._shared} {self._words(count)}".strip()

    def _words(self, count: int) -> str:
        """A full stop counts as one of them: it is a token, too."""
        words = iter(lambda: self._random.choice(WORDS), None)
        places = range(1, count + 1)
        return "".join("." if place % (SENTENCE_WORDS + 1) == 0 else f" {next(words)}" for place in places).strip()
