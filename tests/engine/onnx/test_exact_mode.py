"""In exact mode an answer that was interrupted goes on as it would have gone: the real demo model, our own sampler.

Where a runner is lost, the prompt and the tokens so far are computed anew, together, as a prefill; they were computed
one by one before. Whether the next tokens are the same ones depends on how alike the two are.
"""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from llama_twin import LlamaTwin, log_odds

from covey.checkpoints.opening import open_checkpoint
from covey.checkpoints.tokenizer import load_tokenizer
from covey.engine.contract import ALONE, Logits, Piece
from covey.engine.onnx.products import halves
from covey.engine.onnx.stage import OnnxStage
from covey.engine.plan import SamplingStart, StepPlan
from covey.engine.sampler import Sampler
from covey.schema.generation import Sampling
from covey.schema.model import Shard
from tests.engine.harness import make_spec

PROMPTS = [prompt["token_ids"] for prompt in json.loads((Path(__file__).parent / "prompts.json").read_text())]
LAYERS = 30
TOKENS = 64
CUTS = (1, 7, 20, 33, 50, 63)
TEXT = (Path(__file__).parent / "alice.txt").read_text()  # "Alice's Adventures in Wonderland" by Lewis Carroll, 1865
TEXT_TOKENS = 200
SAMPLINGS = {
    "greedy": Sampling(temperature=0.0),
    "seeded": Sampling(temperature=0.8, top_p=0.95, seed=7),
    "penalized": Sampling(temperature=1.0, repetition_penalty=1.1, seed=8),
}


class Runner:
    """Its stages, which may be more than one, and the sampler of the last."""

    def __init__(self, path: Path, bounds: tuple[int, ...], *, exact: bool) -> None:
        self.stages = [loaded(path, range(*ends), exact=exact) for ends in pairwise(bounds)]
        self._sampler = Sampler()
        self._steps = 0

    def run(self, tokens: list[int], start: int, slot: int = 0) -> Logits:
        values = np.array(tokens[start:], np.int64)
        for stage in self.stages:
            values = stage.run([Piece(slot, start, len(tokens) - start, wants_logits=True)], values)
        return values.copy()

    def answer(self, prompt: list[int], sampling: Sampling, begun: list[int] | None = None) -> list[int]:
        """`TOKENS` in all, of which those `begun` came from another runner."""
        begun = begun or []
        tokens, computed = [*prompt, *begun], 0
        start = (SamplingStart(0, sampling, tuple(prompt), tuple(begun)),)
        while len(tokens) < len(prompt) + TOKENS:
            logits = self.run(tokens, computed)
            self._steps += 1
            piece = Piece(0, computed, len(tokens) - computed, wants_logits=True)
            [token_id] = self._sampler.sample(StepPlan(self._steps, (piece,), start), logits).token_ids
            assert token_id is not None
            computed, start = len(tokens), ()
            tokens.append(token_id)
        return tokens[len(prompt) :]


def loaded(path: Path, layers: range, *, exact: bool) -> OnnxStage:
    stage = OnnxStage()
    spec = make_spec(
        engine="onnx",
        engine_options={"exact": "1"} if exact else {},
        model_path=str(path),
        shard=Shard(layers.start, layers.stop, LAYERS),
        context_length=256,
        slot_count=1,
        thread_count=2,
    )
    stage.load(spec, lambda _: None, ALONE)
    return stage


@pytest.fixture(scope="module")
def exact(demo_model: Path) -> Runner:
    return Runner(demo_model, (0, LAYERS), exact=True)


@pytest.fixture(scope="module")
def rounding(demo_model: Path) -> Runner:
    return Runner(demo_model, (0, LAYERS), exact=False)


def test_real_text_is_read_as_plain_arithmetic_reads_it(exact: Runner, rounding: Runner, demo_model: Path) -> None:
    """Against float64. More of it, and all quantisations: `bench/exactness.py`."""
    tokenizer = load_tokenizer(open_checkpoint(demo_model))
    tokens = tokenizer.encode(TEXT, parse_special=False, add_special=True)[:TEXT_TOKENS]
    expected = LlamaTwin(demo_model, np.float64).logits(tokens)[:-1]
    following = np.arange(TEXT_TOKENS - 1), tokens[1:]
    surprise = -log_odds(expected)[following].mean()
    for runner, agreed_least, apart_most in ((exact, 0.98, 0.01), (rounding, 0.93, 0.03)):
        piece = Piece(0, 0, TEXT_TOKENS, wants_logits=True, guess_count=TEXT_TOKENS - 1)
        logits = runner.stages[0].run([piece], np.array(tokens, np.int64))[:-1]
        agreed = np.mean(logits.argmax(axis=-1) == expected.argmax(axis=-1))
        perplexities = np.exp(-log_odds(logits)[following].mean() - surprise)
        print(f"top-1 agreement {agreed:.4f}, perplexity {perplexities:.5f} times the twin's")
        assert agreed >= agreed_least
        assert abs(perplexities - 1) <= apart_most


def differences(runner: Runner) -> np.ndarray:
    """Of each prompt, between the last logits computed token by token and all together: the largest."""
    found = []
    for prompt in PROMPTS[:2]:
        alone = [runner.run(prompt[: at + 1], at) for at in range(len(prompt))][-1]
        found.append(np.abs(alone - runner.run(prompt, 0)).max())
    return np.array(found)


def test_a_token_computed_alone_has_the_logits_of_one_computed_with_others(exact: Runner, rounding: Runner) -> None:
    """A thousandth of what decides between tokens; the other mode, which rounds activations, is far from that."""
    in_exact, elsewhere = differences(exact).max(), differences(rounding).max()
    print(f"largest difference of logits: exact {in_exact:.1e}, else {elsewhere:.1e}")
    assert in_exact < 1e-3
    assert elsewhere > 0.05


@pytest.mark.parametrize("name", SAMPLINGS)
def test_an_answer_goes_on_as_it_would_have_gone(exact: Runner, name: str) -> None:
    prompt = PROMPTS[0]
    whole = exact.answer(prompt, SAMPLINGS[name])
    for cut in CUTS:
        assert [*whole[:cut], *exact.answer(prompt, SAMPLINGS[name], whole[:cut])[cut:]] == whole, cut


def test_so_it_does_in_two_stages(demo_model: Path) -> None:
    split = Runner(demo_model, (0, 13, LAYERS), exact=True)
    whole = split.answer(PROMPTS[2], SAMPLINGS["seeded"])
    for cut in CUTS[::2]:
        assert split.answer(PROMPTS[2], SAMPLINGS["seeded"], whole[:cut]) == whole


def test_codes_of_8_bits_are_halved_without_loss() -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(2, 4, 32)
    high, low = (np.stack([half & 0x0F, half >> 4], axis=-1).reshape(codes.shape) for half in halves(codes))
    assert np.array_equal(high.astype(int) * 16 + low, codes)
