"""The ONNX engine on tiny random checkpoints: right numbers, right slots, right refusals."""

from pathlib import Path

import numpy as np
import pytest
from llama_twin import LlamaTwin, divergences
from tiny_llama import HEAD, HIDDEN, LAYERS, VOCABULARY, shapes, write_tiny_llama

from covey.checkpoints.checkpoint import CheckpointError
from covey.checkpoints.gguf_file import read_header
from covey.engine.contract import ALONE, Copy, EngineError, LoadProgress, Piece
from covey.engine.onnx.stage import OnnxStage, neighbours
from covey.schema.model import Shard
from covey.schema.runner import RunnerSpec
from tests.engine.harness import make_spec

BLOCKED = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4",
)  # fmt: skip
TOKENS = np.random.default_rng(3).integers(0, VOCABULARY, 40).astype(np.int64)


def spec(
    path: Path, *, layers: range = range(LAYERS), slots: int = 2, context: int = 64, exact: bool = False
) -> RunnerSpec:
    return make_spec(
        engine="onnx",
        engine_options={"exact": "1"} if exact else {},
        model_path=str(path),
        shard=Shard(layers.start, layers.stop, LAYERS),
        context_length=context,
        slot_count=slots,
        thread_count=2,
    )


def loaded(path: Path, **options) -> OnnxStage:
    stage = OnnxStage()
    stage.load(spec(path, **options), lambda _: None, ALONE)
    return stage


def piece(slot: int, position: int, token_count: int = 1) -> Piece:
    return Piece(slot, position, token_count, wants_logits=True)


def silent(slot: int, position: int, token_count: int) -> Piece:
    return Piece(slot, position, token_count, wants_logits=False)


def each_logits(stage: OnnxStage, tokens: np.ndarray, slot: int = 0) -> np.ndarray:
    """Logits after every token, fed one by one."""
    steps = [stage.run([piece(slot, at)], tokens[at : at + 1]).copy() for at in range(len(tokens))]
    return np.concatenate(steps)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", {"token_embd": "Q8_0"}, default="Q4_1")


@pytest.fixture(scope="module")
def stage(tiny) -> OnnxStage:
    return loaded(tiny)


@pytest.mark.parametrize("tensor_type", ["F32", "F16", "BF16", *BLOCKED])
def test_each_type_against_the_twin(tensor_type, tmp_path):
    path = write_tiny_llama(tmp_path / "tiny.gguf", {}, default=tensor_type)
    expected = LlamaTwin(path).logits(TOKENS.tolist())
    actual = each_logits(loaded(path), TOKENS)
    spread = expected.std()
    if tensor_type in {"F32", "F16", "BF16"}:
        assert np.abs(actual - expected).max() < 1e-4 * spread
    else:  # the operator rounds activations to 8 bits per block, as llama.cpp does
        assert np.sqrt(np.mean((actual - expected) ** 2)) < 0.03 * spread
        assert divergences(expected, actual).mean() < 1e-3


@pytest.mark.parametrize("tensor_type", ["F16", *BLOCKED])
def test_each_type_is_exact_where_that_is_asked_for(tensor_type, tmp_path):
    path = write_tiny_llama(tmp_path / "tiny.gguf", {}, default=tensor_type)
    expected = LlamaTwin(path).logits(TOKENS.tolist())
    stage = loaded(path, exact=True)
    actual = each_logits(stage, TOKENS)
    assert np.abs(actual - expected).max() < 1e-4 * expected.std()
    together = stage.run([piece(1, 0, len(TOKENS))], TOKENS)
    assert np.abs(together - actual[-1:]).max() < 1e-4 * expected.std()


def test_types_mixed_as_quantisers_mix_them(tmp_path):
    types = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "ffn_up": "Q5_K", "token_embd": "Q6_K", "output": "F16"}
    path = write_tiny_llama(tmp_path / "mixed.gguf", types, default="Q4_K", tied=False)
    expected = LlamaTwin(path).logits(TOKENS.tolist())
    actual = each_logits(loaded(path), TOKENS)
    assert np.sqrt(np.mean((actual - expected) ** 2)) < 0.03 * expected.std()


@pytest.mark.parametrize(
    "extra",
    [
        {"texts": {"llama.rope.scaling.type": "linear"}, "floats": {"llama.rope.scaling.factor": 4.0}},
        {"tensors": {"rope_freqs.weight": np.linspace(1, 8, HEAD // 2).astype(np.float32)}},
    ],
    ids=["linear", "divisors of Llama 3"],
)
def test_scaled_positions(extra, tmp_path):
    path = write_tiny_llama(tmp_path / "scaled.gguf", {}, default="F32", extra=extra)
    expected = LlamaTwin(path).logits(TOKENS.tolist())
    assert np.abs(each_logits(loaded(path), TOKENS) - expected).max() < 1e-4 * expected.std()


def test_a_prompt_in_chunks_is_the_prompt_in_one(stage):
    whole = stage.run([piece(0, 0, 40)], TOKENS).copy()
    for start, end in ((0, 7), (7, 8), (8, 31), (31, 40)):
        last = stage.run([piece(1, start, end - start)], TOKENS[start:end])
    assert np.abs(last - whole).max() < 1e-4 * whole.std()


def test_several_pieces_in_one_step_are_several_steps(tiny):
    """A prompt is being read in slot 1 while others decode in slots 0, 2 and 3; order must not matter. (What differs is
    where a sum of floats fell to the other side of a step of 8 bits.)
    """
    stage = loaded(tiny, slots=4)
    alone = {slot: each_logits(stage, TOKENS[slot : slot + 12], slot) for slot in range(4)}
    for slot, length in ((0, 4), (2, 11), (3, 7)):
        stage.run([silent(slot, 0, length)], TOKENS[slot : slot + length])
    pieces = [piece(3, 7, 1), piece(1, 0, 12), silent(0, 4, 1), piece(2, 11, 1)]
    values = np.concatenate([TOKENS[p.slot + p.position : p.slot + p.position + p.token_count] for p in pieces])
    together = stage.run(pieces, values).copy()
    expected = np.stack([alone[3][7], alone[1][11], alone[2][11]])
    assert together.shape == (3, VOCABULARY)
    assert np.abs(together - expected).max() < 1e-2 * expected.std()
    following = stage.run([piece(0, 5, 1)], TOKENS[5:6]).copy()
    assert np.abs(following - alone[0][5]).max() < 1e-2 * expected.std()


def test_all_runs_share_the_memory_of_their_results(tiny):
    """A result for each range of slots took hundreds of megabytes where vocabularies are large."""
    stage = loaded(tiny, slots=4)
    ranges = [range(first, last) for first in range(4) for last in range(first + 1, 5)]
    wide, *others = sorted(ranges, key=len, reverse=True)
    widest = stage.run([piece(slot, 0) for slot in wide], TOKENS[:4])
    for slots in others:
        result = stage.run([piece(slot, 0) for slot in slots], TOKENS[: len(slots)])
        assert result.shape == (len(slots), VOCABULARY)
        assert np.shares_memory(result, widest)


def test_runs_that_grow_and_shrink_disturb_nothing(tiny):
    """Room for a larger run is made in the middle of the work of smaller ones."""
    stage, alone = loaded(tiny, slots=4), loaded(tiny, slots=4)
    expected = each_logits(alone, TOKENS[:16])
    for start, length, slots in ((0, 1, 1), (1, 1, 2), (2, 5, 1), (7, 1, 4), (8, 1, 3), (9, 6, 1), (15, 1, 4)):
        for slot in range(slots, 4):
            stage.run([silent(slot, start, length)], TOKENS[start : start + length])
        if length > 1:
            result = np.concatenate(
                [stage.run([piece(slot, start, length)], TOKENS[start : start + length]) for slot in range(slots)]
            )
        else:
            result = stage.run([piece(slot, start) for slot in range(slots)], np.repeat(TOKENS[start], slots))
        assert np.abs(result - expected[start + length - 1]).max() < 1e-2 * expected.std()


def test_neighbours_that_decode_run_together():
    pieces = [
        piece(5, 9, 1),
        piece(1, 0, 8),
        piece(0, 3, 1),
        piece(2, 1, 1),
        piece(4, 0, 1),
    ]
    assert neighbours(pieces) == [[2], [1], [3], [4, 0]]


def test_going_back_drops_what_was_cached(stage):
    expected = each_logits(stage, TOKENS[:10], 0)
    stage.run([silent(1, 0, 30)], TOKENS[10:40])
    stage.run([silent(1, 0, 9)], TOKENS[:9])
    again = stage.run([piece(1, 9, 1)], TOKENS[9:10]).copy()
    assert np.abs(again - expected[9]).max() < 1e-3 * expected.std()


@pytest.mark.parametrize("stage_count", [1, 2])
def test_what_another_slot_holds_is_copied(tiny, stage_count):
    """To an empty slot and to one that holds a beginning, to the bit; who lent goes on as if nothing had been."""
    seam = LAYERS // 2
    ranges = [range(LAYERS)] if stage_count == 1 else [range(seam), range(seam, LAYERS)]
    stages = [loaded(tiny, layers=each, slots=3) for each in ranges]

    def run(each: Piece, tokens: np.ndarray) -> np.ndarray:
        values = tokens
        for stage in stages:
            values = stage.run([each], values).copy()
        return values

    run(silent(0, 0, 20), TOKENS[:20])
    run(silent(1, 0, 8), np.concatenate([TOKENS[:5], TOKENS[:3]]))
    expected = run(piece(0, 20), TOKENS[20:21])
    for slot, start in ((2, 0), (1, 5)):
        assert np.array_equal(run(Piece(slot, 20, 1, wants_logits=True, copy=Copy(0, start)), TOKENS[20:21]), expected)
    assert np.array_equal(run(piece(0, 20), TOKENS[20:21]), expected)


@pytest.mark.parametrize("stage_count", [1, 2])
def test_guesses_have_the_logits_of_single_tokens(tiny, stage_count):
    """Beside other pieces, too, and from a second stage; wrong ones are forgotten."""
    seam = LAYERS // 2
    ranges = [range(LAYERS)] if stage_count == 1 else [range(seam), range(seam, LAYERS)]
    whole, stages = loaded(tiny, exact=True), [loaded(tiny, layers=each, exact=True) for each in ranges]
    alone = each_logits(whole, TOKENS[:12])
    steps = [
        ([silent(0, 0, 8), silent(1, 0, 5)], [TOKENS[:8], TOKENS[:5]]),
        ([Piece(0, 8, 3, wants_logits=True, guess_count=2)], [TOKENS[[8, 1, 1]]]),
        ([Piece(0, 8, 4, wants_logits=True, guess_count=3), piece(1, 5)], [TOKENS[8:12], TOKENS[5:6]]),
    ]
    for pieces, tokens in steps:
        values = np.concatenate(tokens)
        for each in stages:
            values = each.run(pieces, values)
    assert np.abs(values - alone[[8, 9, 10, 11, 5]]).max() < 1e-4 * alone.std()


def test_stages_one_after_another_are_the_whole(tiny):
    whole = each_logits(loaded(tiny), TOKENS)
    parts = [loaded(tiny, layers=layers) for layers in (range(1), range(1, 2), range(2, 3))]
    for at in range(len(TOKENS)):
        values = TOKENS[at : at + 1]
        for part in parts:
            values = part.run([piece(0, at)], values)
        assert np.array_equal(values[0], whole[at])


def test_a_stage_reads_no_other_tensors(tiny, tmp_path):
    """The rest of the file may be noise, or not there at all."""
    header = read_header(tiny)
    for layers in (range(1), range(1, 2), range(2, 3)):
        content = bytearray(tiny.read_bytes())
        noise = np.random.default_rng(9)
        for name, entry in header.tensors.items():
            if not belongs(name, layers):
                content[entry.offset : entry.offset + entry.byte_count] = noise.bytes(entry.byte_count)
        noisy = tmp_path / f"noisy{layers.start}.gguf"
        noisy.write_bytes(content)
        values = TOKENS if layers.start == 0 else np.random.default_rng(4).standard_normal((40, HIDDEN), np.float32)
        pieces = [piece(0, 0, 40)]
        answers = [loaded(path, layers=layers).run(pieces, values) for path in (tiny, noisy)]
        assert np.array_equal(*answers)


def belongs(name: str, layers: range) -> bool:
    if name.startswith("blk."):
        return int(name.split(".")[1]) in layers
    return layers.stop == LAYERS or (layers.start == 0 and name == "token_embd.weight")


def test_progress_counts_layers_and_bytes(tiny):
    seen: list[LoadProgress] = []
    OnnxStage().load(spec(tiny, layers=range(1, 3)), seen.append, ALONE)
    assert [(step.layers_loaded, step.layers_total) for step in seen] == [(0, 2), (1, 2), (2, 2)]
    assert seen[-1].bytes_loaded == seen[-1].bytes_total == own_bytes(tiny, range(1, 3))


def test_reading_the_embedding_is_progress(tiny):
    """Of a large vocabulary it takes as long as many layers."""
    seen: list[LoadProgress] = []
    OnnxStage().load(spec(tiny, layers=range(2)), seen.append, ALONE)
    assert seen[0].layers_loaded == 0
    assert seen[0].bytes_loaded == own_bytes(tiny, range(0))


def own_bytes(path: Path, layers: range) -> int:
    tensors = read_header(path).tensors.values()
    return sum(entry.byte_count for entry in tensors if belongs(entry.name, layers))


def test_warming_up_leaves_nothing_behind(tiny):
    stage = loaded(tiny)
    stage.warm_up()
    with pytest.raises(EngineError, match="slot 0 holds 0 tokens"):
        stage.run([piece(0, 1, 1)], TOKENS[:1])
    assert np.array_equal(each_logits(stage, TOKENS[:5]), each_logits(loaded(tiny), TOKENS[:5]))


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([piece(2, 0, 1)], "names slot 2"),
        ([piece(-1, 0, 1)], "names slot -1"),
        ([piece(1, 5, 1)], "holds 0 tokens; 5 leaves a gap"),
        ([piece(1, 0, 65)], "slot 1 is full: it holds 64"),
        ([piece(1, 0, 1), piece(1, 1, 1)], "one slot twice"),
        ([Piece(1, 5, 1, wants_logits=True, copy=Copy(0, 0))], "holds 0 tokens; 5 leaves a gap"),
        ([Piece(1, 5, 1, wants_logits=True, copy=Copy(0, 1))], "holds 0 tokens; 5 leaves a gap"),
        ([Piece(1, 0, 1, wants_logits=True, copy=Copy(2, 0))], "copies slot 2"),
        ([Piece(1, 0, 1, wants_logits=True, copy=Copy(1, 0))], "copies slot 1 to slot 1"),
    ],
)
def test_a_step_that_makes_no_sense_is_refused(pieces, message, tiny):
    stage = loaded(tiny)
    with pytest.raises(EngineError, match=message):
        stage.run(pieces, np.zeros(sum(each.token_count for each in pieces), np.int64))


def test_values_have_to_fit_the_pieces(stage):
    with pytest.raises(EngineError, match="a step of 3 tokens came with 2"):
        stage.run([piece(0, 0, 3)], TOKENS[:2])
    with pytest.raises(EngineError, match=f"outside of the vocabulary of {VOCABULARY}"):
        stage.run([piece(0, 0, 1)], np.array([VOCABULARY]))


def test_a_step_that_wants_no_logits_returns_none(stage):
    assert stage.run([silent(0, 0, 3)], TOKENS[:3]).shape == (0, VOCABULARY)


@pytest.mark.parametrize(
    ("extra", "types", "message"),
    [
        ({"architecture": "mamba"}, {}, "architecture 'mamba'; this engine knows .*llama"),
        (
            {"tensors": {"blk.1.ffn_gate_inp.weight": np.zeros(256, np.float32)}},
            {},
            "ffn_gate_inp.weight', which",
        ),
        (
            {"texts": {"llama.rope.scaling.type": "dynamic"}},
            {},
            "scales its positions by 'dynamic'; known are none, linear",
        ),
        (
            {"tensors": {"blk.1.attn_gate.weight": np.zeros(256, np.float32)}},
            {},
            "'blk.1.attn_gate.weight', which this",
        ),
        ({"integers": {"llama.attention.value_length": 32}}, {}, "heads have 64 key and 32 value sizes"),
        ({"integers": {"llama.attention.key_length": 72}}, {}, "rotates 64 of 72 values of a head"),
        ({}, {"ffn_up": "I8"}, "ffn_up.weight' has the type I8, which can't be run; known are F32"),
    ],
)
def test_what_the_engine_can_t_run_is_named(extra, types, message, tmp_path, monkeypatch):
    monkeypatch.setattr("tiny_llama.random_tensor", lambda _, kind, shape: plain(kind, shape))
    path = write_tiny_llama(tmp_path / "odd.gguf", types, default="F32", extra=extra)
    with pytest.raises(EngineError, match=message):
        loaded(path)


def plain(kind: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, {"I8": np.int8, "F32": np.float32}[kind])


def test_a_missing_tensor_is_named(tmp_path, monkeypatch):
    kept = {name: shape for name, shape in shapes(tied=True).items() if name != "blk.2.ffn_gate.weight"}
    monkeypatch.setattr("tiny_llama.shapes", lambda **_: kept)
    path = write_tiny_llama(tmp_path / "lacking.gguf", {}, default="F32")
    with pytest.raises(CheckpointError, match=r"lacks its tensor 'blk.2.ffn_gate.weight'"):
        loaded(path)


def test_a_tensor_of_the_wrong_size_is_named(tmp_path, monkeypatch):
    changed = shapes(tied=True) | {"blk.1.attn_k.weight": (64, HIDDEN)}
    monkeypatch.setattr("tiny_llama.shapes", lambda **_: changed)
    path = write_tiny_llama(tmp_path / "odd.gguf", {}, default="F32")
    with pytest.raises(CheckpointError, match=r"'blk.1.attn_k.weight' measures \(64, 256\)"):
        loaded(path)


def test_a_shard_of_another_model_is_refused(tiny):
    odd = RunnerSpec(**{**as_dict(spec(tiny)), "shard": Shard(0, 5, 5)})
    with pytest.raises(EngineError, match="has 3 layers, not 5"):
        OnnxStage().load(odd, lambda _: None, ALONE)


def as_dict(struct: RunnerSpec) -> dict:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def test_running_before_loading_is_refused(tiny):
    with pytest.raises(EngineError, match="before it was loaded"):
        OnnxStage().run([piece(0, 0, 1)], np.zeros((1, HIDDEN), np.float32))


# ---- taking on layers, and giving some up ----


def grown(path: Path, first: range, then: range) -> tuple[OnnxStage, list[LoadProgress]]:
    stage = loaded(path, layers=first)
    stage.warm_up()
    seen: list[LoadProgress] = []
    stage.load(spec(path, layers=then), seen.append, ALONE)
    return stage, seen


@pytest.mark.parametrize(
    ("first", "missing"), [(range(1), range(1, 3)), (range(1, 2), range(0)), (range(2, 3), range(2))]
)
def test_a_stage_that_takes_on_layers_reads_only_those_and_answers_as_if_it_had_all_along(tiny, first, missing):
    stage, seen = grown(tiny, first, range(LAYERS))
    whole = loaded(tiny)
    pieces, tokens = [piece(0, 0, 5)], np.array([1, 5, 9, 2, 7])
    np.testing.assert_array_equal(stage.run(pieces, tokens), whole.run(pieces, tokens))
    np.testing.assert_array_equal(stage.run([piece(0, 5)], np.array([3])), whole.run([piece(0, 5)], np.array([3])))
    assert seen[-1].layers_loaded == seen[-1].layers_total == LAYERS
    if missing:
        assert seen[-1].bytes_total == own_bytes(tiny, missing)


def test_what_a_stage_took_on_it_gives_up_without_reading_anything(tiny):
    stage, _ = grown(tiny, range(2), range(LAYERS))
    seen: list[LoadProgress] = []
    stage.load(spec(tiny, layers=range(2)), seen.append, ALONE)
    assert seen == []
    pieces, tokens = [piece(0, 0, 5)], np.array([1, 5, 9, 2, 7])
    np.testing.assert_array_equal(stage.run(pieces, tokens), loaded(tiny, layers=range(2)).run(pieces, tokens))


def test_nothing_is_kept_for_another_context_or_another_file(tiny, tmp_path):
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(tiny.read_bytes())
    for other in (spec(tiny, context=32), spec(copy)):
        seen: list[LoadProgress] = []
        loaded(tiny).load(other, seen.append, ALONE)
        assert seen[-1].bytes_loaded == own_bytes(tiny, range(LAYERS))


def test_slots_are_empty_after_loading_again(tiny):
    stage = loaded(tiny)
    stage.run([piece(0, 0, 5)], np.array([1, 5, 9, 2, 7]))
    stage.load(spec(tiny), lambda _: None, ALONE)
    with pytest.raises(EngineError, match="leaves a gap"):
        stage.run([piece(0, 5)], np.array([3]))
