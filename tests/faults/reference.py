"""What the model says, computed in this process by one stage that holds all of it: nothing is split, lost or resumed.

A row of logits is the same, bit for bit, whatever is computed beside it, on however many threads and stages; only
whether its token was read alone (decode) or with others (prefill, guesses) matters: these differ by up to 1.7,
measured. So an answer that went on elsewhere, or of which some tokens were guessed, is led along its own tokens: what
the new holder read at once is read at once here, and each later token has to be the best of these logits, or nearly so.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from covey.checkpoints.gguf_file import read_header
from covey.engine.contract import ALONE, Piece
from covey.engine.onnx.stage import OnnxStage
from covey.schema.generation import ChatMessage
from covey.schema.model import Shard
from covey.serving.model_text import ModelText, load_model_text
from tests.engine.harness import make_spec

CONTEXT = 1024
SLOTS = 4
NEAR = 2.0  # logits: what a cache that was filled otherwise than we think may change; a wrong token lacks far more


class Reference:
    """The whole model in this process."""

    def __init__(self, model: Path) -> None:
        header = read_header(model)
        layers = header.metadata["llama.block_count"]
        spec = make_spec(
            engine="onnx", model_path=str(model), shard=Shard(0, layers, layers), context_length=CONTEXT, thread_count=2
        )
        self.text: ModelText = load_model_text(header)
        self._stage = OnnxStage()
        self._stage.load(spec, lambda _: None, ALONE)

    def prompt_ids(self, prompt: str) -> list[int]:
        return self.text.prompt_ids([ChatMessage("user", prompt)])

    def answers(self, prompts: Sequence[str], count: int) -> list[list[int]]:
        """Greedy ones, of `count` tokens each, whatever they say; at most `SLOTS` prompts."""
        rows = [self._read(slot, self.prompt_ids(prompt)) for slot, prompt in enumerate(prompts)]
        told: list[list[int]] = [[] for _ in prompts]
        lengths = [len(self.prompt_ids(prompt)) for prompt in prompts]
        for step in range(count):
            for slot, row in enumerate(rows):
                told[slot].append(int(row.argmax()))
            rows = self._next({slot: (lengths[slot] + step, told[slot][-1]) for slot in range(len(prompts))})
        return told

    def lacks(self, prompt: str, token_ids: Sequence[int], first: int, last: int) -> list[float]:
        """By how much each of `token_ids[first:last]` is worse than the best, where prompt and `token_ids[:first]` were
        read at once and each later one alone: 0 for what a greedy sampler picks.
        """
        before = [*self.prompt_ids(prompt), *token_ids[:first]]
        row, found = self._read(0, before), []
        for place, token_id in enumerate(token_ids[first:last]):
            found.append(float(row.max() - row[token_id]))
            row = self._next({0: (len(before) + place, token_id)})[0]
        return found

    def ending_lacks(self, prompt: str, token_ids: Sequence[int], first: int) -> float:
        """By how much the best of the tokens that end a turn is worse than the best, after all of `token_ids`."""
        before = [*self.prompt_ids(prompt), *token_ids[:first]]
        row = self._read(0, before)
        for place, token_id in enumerate(token_ids[first:]):
            row = self._next({0: (len(before) + place, token_id)})[0]
        return float(row.max() - max(row[stop] for stop in self.text.stop_token_ids))

    def _read(self, slot: int, token_ids: Sequence[int]) -> np.ndarray:
        piece = Piece(slot, 0, len(token_ids), wants_logits=True)
        return self._stage.run([piece], np.array(token_ids, np.int64))[0].copy()

    def _next(self, tokens: dict[int, tuple[int, int]]) -> np.ndarray:
        """After (position, token) of each slot."""
        pieces = [Piece(slot, position, 1, wants_logits=True) for slot, (position, _) in tokens.items()]
        return self._stage.run(pieces, np.array([token for _, token in tokens.values()], np.int64)).copy()


def lengths_read(token_count: int, prompt_tokens: int, read_again: Sequence[int]) -> list[tuple[int, int]]:
    """(first, last) of the tokens that each head picked, from how many tokens each read first."""
    starts = sorted({0, *(total - prompt_tokens for total in read_again if total > prompt_tokens)})
    return [(first, last) for first, last in zip(starts, [*starts[1:], token_count], strict=True) if first < last]


class Judgement:
    """Of one answer: `wrong` says why it is wrong, `near` counts tokens that are only nearly the best."""

    def __init__(self, wrong: str = "", near: int = 0) -> None:
        self.wrong, self.near = wrong, near


def judge(
    reference: Reference, prompt: str, undisturbed: Sequence[int], token_ids: Sequence[int], read_again: Sequence[int]
) -> Judgement:
    """`undisturbed`: the answer as it is when nothing happens, at least as long."""
    if list(token_ids) == list(undisturbed[: len(token_ids)]):
        return Judgement()
    parts = lengths_read(len(token_ids), len(reference.prompt_ids(prompt)), read_again)
    until = parts[0][1] if parts else 0
    if list(token_ids[:until]) == list(undisturbed[:until]):
        parts = parts[1:]
    near = 0
    for first, last in parts:
        lacks = reference.lacks(prompt, token_ids, first, last)
        worst = max(range(len(lacks)), key=lacks.__getitem__)
        near += sum(lack > 0 for lack in lacks)
        if lacks[worst] > NEAR:
            place = first + worst
            return Judgement(f"token {place} of {list(token_ids)} lacks {lacks[worst]:.2f} (read at {first})", near)
    return Judgement(near=near)
