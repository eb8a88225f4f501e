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

from covey.checkpoints.checkpoint import CheckpointError, TensorReader
from covey.checkpoints.gguf_file import read_header
from covey.engine.contract import ALONE, EngineError, Piece
from covey.engine.onnx.settings import read_settings
from covey.engine.onnx.stage import OnnxStage
from covey.engine.onnx.weights import StageFile
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
    stage.load(spec, lambda _: None, ALONE)
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


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16"])
def test_quantised_experts_are_their_dequantised_selves(kind, tmp_path):
    """Float weights are proven above; each expert's part of a quantised tensor has to be the right one."""
    tiny = FAMILIES["qwen3moe"]
    quantised = tiny_families.write(tiny, tmp_path / "quantised.gguf", experts=kind)
    plain = tiny_families.write(tiny, tmp_path / "plain.gguf", experts=kind, dequantised=True)
    actual, expected = (Pipeline(path, tiny.layers, exact=True).run(piece(0, 0, TOKENS)) for path in (quantised, plain))
    assert np.abs(actual - expected).max() < TOLERANCE * np.ptp(expected)
    rounded = Pipeline(quantised, tiny.layers).run(piece(0, 0, TOKENS))
    assert np.abs(rounded - expected).max() < 0.1 * np.ptp(expected)


def test_many_experts_become_several_graphs(monkeypatch, tmp_path):
    """A graph with the branches of thousands of experts takes minutes to load."""
    tiny = FAMILIES["mixtral"]
    path = tiny_families.write(tiny, tmp_path / "tiny.gguf")
    whole = Pipeline(path, tiny.layers)
    monkeypatch.setattr("covey.engine.onnx.segment.EXPERTS_MAX", 8)  # two layers of four
    parts = Pipeline(path, tiny.layers)
    assert [len(pipeline.stages[0]._segments) for pipeline in (whole, parts)] == [1, 2]
    np.testing.assert_array_equal(parts.run(piece(0, 0, 20)), whole.run(piece(0, 0, 20)))


@pytest.mark.parametrize(
    ("family", "stated", "message"),
    [
        ("mixtral", {"llama.expert_gating_func": 2}, "chooses experts by the function 2; known is only softmax"),
        ("mixtral", {"llama.expert_weights_norm": False}, "shares of experts don't add up to 1"),
        ("mixtral", {"llama.expert_weights_scale": 2.5}, "shares of experts don't add up to 1"),
        ("gpt-oss", {"gpt-oss.expert_count": 0}, "gpt-oss model has no experts"),
        ("phi3", {"phi3.rope.dimension_count": 24}, "rotates 24 of 32 values of a head; only multiples of 16"),
        (
            "phi3",
            {"phi3.rope.scaling.type": "su"},
            "scales its positions by 'su'; known are none, linear, llama3",
        ),
    ],
)
def test_what_a_family_can_t_have_is_named(family, stated, message, tmp_path):
    path = tiny_families.write(FAMILIES[family], tmp_path / "odd.gguf", stated=stated)
    with pytest.raises(EngineError, match=message):
        Pipeline(path, FAMILIES[family].layers)


@pytest.mark.parametrize(
    ("family", "stated", "without", "message"),
    [
        ("mixtral", {"llama.expert_used_count": 5}, (), "of its 4 experts 5 are to be used at once"),
        ("mixtral", {}, ("blk.1.ffn_gate_inp.weight",), "lacks its tensor 'blk.1.ffn_gate_inp.weight'"),
        ("qwen3", {}, ("blk.2.attn_k_norm.weight",), "lacks its tensor 'blk.2.attn_k_norm.weight'"),
        ("phi3", {"phi3.rope.scaling.type": "longrope"}, (), "lacks its tensors 'rope_factors_short.weight' and"),
        ("llama3", {"llama.rope.scaling.low_freq_factor": 4.0}, (), "low frequencies are not below its high ones"),
        ("gemma3", {"gemma3.attention.sliding_window": "wide"}, (), "gives gemma3.attention.sliding_window as 'wide'"),
        ("granite", {"covey.rotary_interleaved": 1}, (), "gives covey.rotary_interleaved as 1"),
    ],
)
def test_damage_is_named(family, stated, without, message, tmp_path):
    path = tiny_families.write(FAMILIES[family], tmp_path / "odd.gguf", stated=stated, without=without)
    with pytest.raises(CheckpointError, match=message):
        Pipeline(path, FAMILIES[family].layers)


@pytest.mark.parametrize("family", ["llama", "granite", "gemma3"])
def test_weights_as_hugging_face_lays_them_out(family, tmp_path):
    """Other formats say in their metadata that heads are not permuted, and that the norms' weights count from -1."""
    tiny = FAMILIES[family]
    stated = {"covey.rotary_interleaved": False, "covey.norm_offset": 1.0}
    path = tiny_families.write(tiny, tmp_path / "tiny.gguf", stated=stated, like_hugging_face=True)
    expect_golden(family, Pipeline(path, tiny.layers).run(piece(0, 0, TOKENS)), [TOKENS - 1])


def test_the_graphs_of_a_stage_share_their_rotary_tables(tmp_path):
    """With a context of 131,072 tokens and heads of 128 they take 67 MB, and a mixture of experts has many graphs."""
    header = read_header(tiny_families.write(FAMILIES["gemma3"], tmp_path / "tiny.gguf"))
    architecture = read_settings(header)
    with TensorReader(tmp_path / "tiny.gguf") as reader:
        first, second = (
            StageFile(reader, header, architecture, Shard(start, start + 1, 7), CONTEXT).read_rotary_tables()
            for start in (0, 1)
        )
    for rotary, tables in first.items():
        assert all(np.shares_memory(one, other) for one, other in zip(tables, second[rotary], strict=True))
