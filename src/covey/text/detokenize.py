"""From token ids to text while they come, one by one: no character is shown before all of its bytes are there."""

import codecs
from collections.abc import Callable


class IncrementalDecoder:
    """All that `push` and `finish` return, joined, is the text of all tokens decoded at once.

    An incomplete character waits; bytes that no character has become U+FFFD, just as `bytes.decode` would have it.
    `token_bytes` gives what a token adds to a text, nothing for markup.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes."""
        return self._decoder.decode(self._token_bytes(token_id))

    def finish(self) -> str:
        """What stands for a character that was never completed."""
        return self._decoder.decode(b"", final=True)
