"""From sampled tokens to text: which tokens count, when their text may be shown, and where it stops. No I/O.

Every token that is accepted is told exactly once, with the text that it made possible. Text may have to wait: for the
rest of a character, or because it could be the beginning of a stop string.
"""

from typing import Protocol

from covey.schema.generation import LikelyToken, PickedToken, TextGenerated, TokenSampled
from covey.text.detokenize import IncrementalDecoder
from covey.text.stop import StopStrings


class OutOfOrderError(Exception):
    """The head skipped a token, so the text after it would be wrong."""


class Vocabulary(Protocol):
    """What single tokens are to a reader."""

    def token_bytes(self, token_id: int) -> bytes: ...

    def token_text(self, token_id: int) -> str: ...


class Names:
    """Tokens with their log probabilities, as they are told."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def picked(self, sampled: TokenSampled) -> PickedToken | None:
        """None where log probabilities were not asked for."""
        if sampled.likelihood is None:
            return None
        likely = self._likely(sampled.token_id, sampled.likelihood.logprob)
        likeliest = tuple(self._likely(*each) for each in sampled.likelihood.likeliest)
        return PickedToken(likely.token_id, likely.text, likely.text_bytes, likely.logprob, likeliest)

    def _likely(self, token_id: int, logprob: float) -> LikelyToken:
        text_bytes = tuple(self._vocabulary.token_bytes(token_id))
        return LikelyToken(token_id, self._vocabulary.token_text(token_id), text_bytes, logprob)


class AnswerText:
    """The text of one request, whose prompt has `prompt_length` tokens."""

    def __init__(self, decoder: IncrementalDecoder, stops: StopStrings, prompt_length: int, names: Names) -> None:
        self._decoder = decoder
        self._stops = stops
        self._prompt_length = prompt_length
        self._names = names
        self._waiting: list[TokenSampled] = []  # tokens that have not been told yet
        self.token_ids: list[int] = []  # all that were accepted
        self.stopped = False  # a stop string has come

    def push(self, sampled: TokenSampled) -> TextGenerated | None:
        """Accepts the next token. Raises `OutOfOrderError`."""
        next_position = self._prompt_length + len(self.token_ids)
        if sampled.position < next_position:
            return None  # said twice
        if sampled.position > next_position:
            raise OutOfOrderError
        self.token_ids.append(sampled.token_id)
        self._waiting.append(sampled)
        found = self._stops.push(self._decoder.push(sampled.token_id))
        self.stopped = found.stopped
        return self._tell(found.text) if found.text or found.stopped else None

    def finish(self) -> TextGenerated | None:
        """What was held back; call it once, after the last token, if no stop string came."""
        found = self._stops.push(self._decoder.finish())
        self.stopped = found.stopped
        text = found.text if found.stopped else found.text + self._stops.finish()
        return self._tell(text) if text or self._waiting else None

    def _tell(self, text: str) -> TextGenerated:
        picked = tuple(each for sampled in self._waiting if (each := self._names.picked(sampled)))
        told = TextGenerated(text, tuple(sampled.token_id for sampled in self._waiting), picked)
        self._waiting.clear()
        return told
