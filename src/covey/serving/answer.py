"""From sampled tokens to text: which tokens count, when their text may be shown, and where it stops. No I/O.

Every token that is accepted is told exactly once, with the text that it made possible. Text may have to wait: for the
rest of a character, or because it could be the beginning of a stop string.
"""

from covey.schema.generation import TextGenerated, TokenSampled
from covey.text.detokenize import IncrementalDecoder
from covey.text.stop import StopStrings


class OutOfOrderError(Exception):
    """The head skipped a token, so the text after it would be wrong."""


class AnswerText:
    """The text of one request, whose prompt has `prompt_length` tokens."""

    def __init__(self, decoder: IncrementalDecoder, stops: StopStrings, prompt_length: int) -> None:
        self._decoder = decoder
        self._stops = stops
        self._prompt_length = prompt_length
        self._waiting: list[int] = []  # tokens that have not been told yet
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
        self._waiting.append(sampled.token_id)
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
        told = TextGenerated(text, tuple(self._waiting))
        self._waiting.clear()
        return told
