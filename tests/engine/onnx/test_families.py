"""Each family's tiny random checkpoint says what Hugging Face transformers says to it.

The goldens' script is `make_family_goldens.py`. The 40 tokens go far beyond the sliding windows, which are 8 tokens,
and beyond the original context of those whose positions are scaled.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny_families
from tiny_families import CONTEXT, FAMILIES, TOKENS

from covey.engine.contract import Piece
from covey.engine.onnx.stage import OnnxStage
from covey.schema.model import Shard
from tests.engine.harness import make_spec

GOLDENS = {name: np.load(Path(__file__).parent / "goldens" / f"{name}.npz")["logits"] for name in FAMILIES}
TOLERANCE = 1e-4  # of the logits' range
IDS = tiny_families.token_ids()


class Pipeline:
    """One stage for each pair of neighbouring bounds."""

    def __init__(self, path: Path, layers: int, *cuts: int, exact: bool = False) -> None:
        bounds = (0, *cuts, layers)
        self.stages = [loaded(path, Shard(start, end, layers), exact=exact) for start, end in pairwise(bounds)]

    def run(self, *pieces: Piece) -> np.ndarray:
        """Every piece reads `IDS` from its position on."""
        values = np.concatenate([IDS[piece.position : piece.position + piece.token_count] for piece in pieces])
        for stage in self.stages:
            values = stage.run(pieces, values).copy()
        return values


def loaded(path: Path, shard: Shard, *, exact: bool) -> OnnxStage:
    stage = OnnxStage()
    spec = make_spec(
        engine="onnx",
        engine_options={"exact": "1"} if exact else {},
        model_path=str(path),
        shard=shard,
        context_length=CONTEXT,
        slot_count=3,
        thread_count=2,
    )
    stage.load(spec, lambda _: None)
    return stage


def piece(slot: int, position: int, token_count: int = 1, *, wants_logits: bool = True) -> Piece:
    return Piece(slot, position, token_count, wants_logits)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def path(family, tmp_path_factory) -> Path:
    return tiny_families.write(FAMILIES[family], tmp_path_factory.mktemp("families") / f"{family}.gguf")


def expect_golden(family: str, actual: np.ndarray, positions: list[int]) -> None:
    expected = GOLDENS[family][positions]
    assert np.abs(actual - expected).max() < TOLERANCE * np.ptp(GOLDENS[family])


def test_token_by_token(family, path):
    pipeline = Pipeline(path, FAMILIES[family].layers)
    actual = np.concatenate([pipeline.run(piece(0, at)) for at in range(TOKENS)])
    expect_golden(family, actual, list(range(TOKENS)))


def test_a_prompt_in_chunks_then_decoding_in_two_stages(family, path):
    """Other slots are busy with other parts of the same text; a cut goes through the middle of the layers."""
    layers = FAMILIES[family].layers
    pipeline = Pipeline(path, layers, layers // 2)
    last = [pipeline.run(piece(1, start, end - start)) for start, end in pairwise((0, 7, 8, 24, 30))][-1]
    expect_golden(family, last, [29])
    expect_golden(family, pipeline.run(piece(2, 0, 26)), [25])
    expect_golden(family, pipeline.run(piece(2, 26), piece(0, 0, 13), piece(1, 30)), [26, 12, 30])
    for step in range(1, 8):
        together = pipeline.run(piece(0, 12 + step), piece(1, 30 + step), piece(2, 26 + step))
        expect_golden(family, together, [12 + step, 30 + step, 26 + step])


def test_exact_mode(family, path):
    pipeline = Pipeline(path, FAMILIES[family].layers, exact=True)
    expect_golden(family, pipeline.run(piece(0, 0, TOKENS)), [TOKENS - 1])


def test_where_the_layers_are_cut_changes_no_bit(family, path):
    layers = FAMILIES[family].layers
    whole = Pipeline(path, layers).run(piece(0, 0, 20))
    for cut in range(1, layers):
        np.testing.assert_array_equal(Pipeline(path, layers, cut).run(piece(0, 0, 20)), whole)
