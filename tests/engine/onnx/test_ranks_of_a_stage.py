"""The ranks of a stage say together what the stage says alone, whatever it was cut into, and end when one is lost."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_families
from test_hub_folder_stage import hub_folder
from tiny_families import FAMILIES
from tiny_llama import LAYERS, VOCABULARY, write_tiny_llama

from covey.checkpoints.checkpoint import CheckpointError
from covey.checkpoints.quantizing import quantize
from covey.engine.contract import ALONE, Copy, EngineError, Exchange, LoadProgress, Piece
from covey.engine.link import LinkBrokenError
from covey.engine.onnx.cutting import columns_of, in_blocks, rows_of
from covey.engine.onnx.stage import OnnxStage
from covey.schema.model import Shard
from tests.engine.harness import make_spec
from tests.engine.ranks import channel_exchanges, in_thread, memory_exchanges, side_by_side

CONTEXT = 64
TOKENS = np.random.default_rng(3).integers(0, VOCABULARY, 40).astype(np.int64)
GOLDENS = Path(__file__).parent / "goldens"
PROMPTS = [prompt["token_ids"] for prompt in json.loads((Path(__file__).parent / "prompts.json").read_text())]
CUT_FAMILIES = [name for name in FAMILIES if not name.startswith("olmo")]


def stage_of(
    path: Path, shard: Shard, exchange: Exchange = ALONE, *, context: int = CONTEXT, **options: str
) -> OnnxStage:
    stage = OnnxStage()
    spec = make_spec(
        engine="onnx", engine_options=options, model_path=str(path), shard=shard, context_length=context, slot_count=3,
        thread_count=1, rank=exchange.rank, rank_count=exchange.count,
    )  # fmt: skip
    stage.load(spec, lambda _: None, exchange)
    return stage


class Ranks:
    """One stage after another, each of several ranks."""

    def __init__(self, stages: Sequence[tuple[Sequence[Exchange], list[OnnxStage]]]) -> None:
        self.stages = stages

    def run(self, pieces: Sequence[Piece], values: np.ndarray) -> np.ndarray:
        for exchanges, ranks in self.stages:
            given = values

            def step(exchange: Exchange, ranks=ranks, given=given) -> np.ndarray:
                return ranks[exchange.rank].run(pieces, given).copy()

            values, *others = side_by_side(exchanges, step)
            for other in others:  # the same bits, or nothing where rank 0 has the logits
                assert other.shape == (0, values.shape[1]) if ranks is self.stages[-1][1] else (other == values).all()
        return values


@contextmanager
def ranks_of(
    path: Path, count: int, layers: int, *cuts: int, exchanges: Any = memory_exchanges, **options: Any
) -> Iterator[Ranks]:
    with ExitStack() as stack:
        stages = []
        for start, end in pairwise((0, *cuts, layers)):
            made = stack.enter_context(exchanges(count))
            stages.append((made, [stage_of(path, Shard(start, end, layers), each, **options) for each in made]))
        yield Ranks(stages)


def piece(slot: int, position: int, token_count: int = 1, guesses: int = 0) -> Piece:
    return Piece(slot, position, token_count, wants_logits=True, guess_count=guesses)


def all_logits(stage: OnnxStage | Ranks, tokens: np.ndarray) -> np.ndarray:
    """After each token: of a chunk, then one by one."""
    first = len(tokens) - 4
    found = [stage.run([piece(0, 0, first, first - 1)], tokens[:first]).copy()]
    found += [stage.run([piece(0, at)], tokens[at : at + 1]).copy() for at in range(first, len(tokens))]
    return np.concatenate(found)


# ---- the right numbers ----


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", CUT_FAMILIES)
def test_every_family(name: str, count: int, tmp_path: Path) -> None:
    """Against what another implementation says. With 4 ranks, two have the same key-value head."""
    tiny = FAMILIES[name]
    if count > tiny.heads[0] or ("expert_count" in tiny.metadata and count * 16 > tiny_families.EXPERT_FEED_FORWARD):
        pytest.skip("it has too few heads or too small experts for so many ranks")
    path, tokens = tiny_families.write(tiny, tmp_path / "tiny.gguf"), tiny_families.token_ids()
    golden = np.load(GOLDENS / f"{name}.npz")["logits"]
    with ranks_of(path, count, tiny.layers) as ranks:
        actual = all_logits(ranks, tokens)
    assert np.abs(actual - golden).max() < 1e-4 * np.ptp(golden)


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])
def test_a_cache_in_halves(name: str, tmp_path: Path) -> None:
    """Ranks have the keys and values of the stage alone, by heads; and the sinks of their own."""
    tiny = FAMILIES[name]
    path, tokens = tiny_families.write(tiny, tmp_path / "tiny.gguf"), tiny_families.token_ids()
    alone = all_logits(stage_of(path, Shard(0, tiny.layers, tiny.layers), kv_cache="f16"), tokens)
    with ranks_of(path, 2, tiny.layers, kv_cache="f16") as ranks:
        actual = all_logits(ranks, tokens)
    assert np.abs(actual - alone).max() < 1e-3 * np.ptp(alone)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q4_K", "Q6_K"])
def test_each_quantisation(kind: str, count: int, tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", {"token_embd": "Q8_0"}, default=kind, tied=kind != "Q4_K")
    for options, most in (({"exact": "1"}, 1e-4), ({}, 0.1)):
        expected = all_logits(stage_of(path, Shard(0, LAYERS, LAYERS), **options), TOKENS)
        with ranks_of(path, count, LAYERS, **options) as ranks:
            actual = all_logits(ranks, TOKENS)
        assert np.abs(actual - expected).max() < most * expected.std()


@pytest.mark.parametrize("quantize", ["q4", "q8"])
def test_what_is_quantised_at_load_is_rounded_alike(quantize: str, tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", {}, default="F16")
    options = {"exact": "1", "quantize": quantize}
    expected = all_logits(stage_of(path, Shard(0, LAYERS, LAYERS), **options), TOKENS)
    with ranks_of(path, 2, LAYERS, **options) as ranks:
        assert np.abs(all_logits(ranks, TOKENS) - expected).max() < 1e-4 * expected.std()


@pytest.mark.parametrize("count", [2, 3])
def test_three_key_value_heads_by_three_and_blocks_that_do_not_divide(count: int, tmp_path: Path) -> None:
    """96 by 3 in blocks of 16, 96 words by 3; and 6 heads by 2, where the inner size is cut unevenly."""
    tiny = tiny_families.tiny("llama", heads=(6, 3 if count == 3 else 6))
    path, tokens = tiny_families.write(tiny, tmp_path / "tiny.gguf"), tiny_families.token_ids()
    expected = all_logits(stage_of(path, Shard(0, tiny.layers, tiny.layers)), tokens)
    with ranks_of(path, count, tiny.layers) as ranks:
        assert np.abs(all_logits(ranks, tokens) - expected).max() < 1e-4 * expected.std()


@pytest.mark.parametrize("way", ["bf16", "mlx 4/64", "mlx 8/128", "awq", "gptq"])
def test_a_folder_of_a_hub(way: str, tmp_path: Path) -> None:
    """Most of its matrices are read whole. A rank of four has 64 columns of an output with blocks of up to 128."""
    path = hub_folder(tmp_path / "model", way)
    expected = all_logits(stage_of(path, Shard(0, LAYERS, LAYERS), exact="1"), TOKENS)
    with ranks_of(path, 4, LAYERS, exact="1") as ranks:
        assert np.abs(all_logits(ranks, TOKENS) - expected).max() < 1e-4 * expected.std()


@pytest.mark.parametrize("cuts", [(), (1,)], ids=["one stage", "two stages"])
def test_slots_chunks_and_guesses_over_real_connections(cuts: tuple[int, ...], tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", {"token_embd": "Q8_0"}, default="Q4_1", tied=False)
    whole = stage_of(path, Shard(0, LAYERS, LAYERS), exact="1")
    steps = [
        [Piece(1, 0, 17, wants_logits=False)],
        [piece(1, 17, 3), piece(0, 0, 5)],
        [piece(0, 5), piece(1, 20), piece(2, 0)],
        [piece(0, 6), piece(2, 1)],
        [Piece(2, 2, 30, wants_logits=False), piece(1, 21, 4, 3)],
        [piece(1, 22), Piece(0, 7, 1, wants_logits=False)],
        [Piece(0, 32, 1, wants_logits=True, copy=Copy(2, 8))],
    ]
    with ranks_of(path, 2, LAYERS, *cuts, exchanges=channel_exchanges, exact="1") as ranks:
        for pieces in steps:
            tokens = np.concatenate([TOKENS[each.position : each.position + each.token_count] for each in pieces])
            expected, actual = whole.run(pieces, tokens), ranks.run(pieces, tokens)
            assert actual.shape == expected.shape
            assert np.abs(actual - expected).max(initial=0) < 1e-3


def test_three_ranks_of_the_demo_model_say_what_it_says(demo_model: Path) -> None:
    """9 query heads, 3 key-value heads, an inner size of 1536."""
    shard = Shard(0, 30, 30)
    whole = stage_of(demo_model, shard, context=128, exact="1")
    with ranks_of(demo_model, 3, 30, exchanges=channel_exchanges, context=128, exact="1") as ranks:
        for prompt in PROMPTS[:2]:
            tokens, computed = [*prompt], 0
            for _ in range(12):
                step, own = [piece(0, computed, len(tokens) - computed)], np.array(tokens[computed:], np.int64)
                expected, actual = whole.run(step, own), ranks.run(step, own)
                assert np.abs(actual - expected).max() < 1e-3
                assert actual.argmax() == expected.argmax()
                computed = len(tokens)
                tokens.append(int(expected.argmax()))


def test_matrices_are_cut_without_changing_a_weight() -> None:
    weights = np.random.default_rng(1).standard_normal((8, 256), np.float32)
    packed = quantize(weights, 4)
    for columns in (range(64), range(64, 256), range(16, 48), range(16)):
        cut = columns_of(packed, columns)
        assert not isinstance(cut, np.ndarray)
        assert cut.block_size == (32 if columns.start % 32 == columns.stop % 32 == 0 else 16)
        assert cut.scales.shape == (8, len(columns) // cut.block_size)
        small = in_blocks(packed, 16)
        first = columns.start // 16
        np.testing.assert_array_equal(
            cut.codes.reshape(8, -1), small.codes[:, first : columns.stop // 16].reshape(8, -1)
        )
    np.testing.assert_array_equal(rows_of(weights, [range(1, 3), range(5, 6)]), weights[[1, 2, 5]])


# ---- what is read and kept ----


def test_each_rank_reads_its_rows_and_keeps_them_in_the_next_generation(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", {}, default="Q4_1", tied=False)
    shard = Shard(0, LAYERS, LAYERS)

    def read(exchange: Exchange, stage: OnnxStage) -> LoadProgress | None:
        told: list[LoadProgress] = []
        spec = make_spec(
            engine="onnx", model_path=str(path), shard=shard, context_length=CONTEXT, slot_count=3, thread_count=1,
            rank=exchange.rank, rank_count=exchange.count,
        )  # fmt: skip
        stage.load(spec, told.append, exchange)
        return told[-1] if told else None

    whole = read(ALONE, OnnxStage())
    assert whole is not None
    with memory_exchanges(2) as first, memory_exchanges(2) as second:
        stages = [OnnxStage(), OnnxStage()]
        for exchange, stage in zip(first, stages, strict=True):
            progress = read(exchange, stage)
            assert progress is not None
            assert progress.bytes_loaded == progress.bytes_total < 0.75 * whole.bytes_total
        expected = Ranks([(first, stages)]).run([piece(0, 0, 20)], TOKENS[:20])
        assert [read(exchange, stage) for exchange, stage in zip(second, stages, strict=True)] == [None, None]
        np.testing.assert_array_equal(Ranks([(second, stages)]).run([piece(0, 0, 20)], TOKENS[:20]), expected)
        assert read(ALONE, stages[0]) == whole  # another share of every matrix


# ---- refusals and losses ----


def test_what_can_not_be_cut_is_refused(demo_model: Path, tmp_path: Path) -> None:
    with memory_exchanges(2) as exchanges:
        with pytest.raises(EngineError, match="possible is 3 or 9; place it again"):
            stage_of(demo_model, Shard(0, 30, 30), exchanges[1])
        olmo = FAMILIES["olmo2"]
        with pytest.raises(EngineError, match="norm all heads together"):
            stage_of(tiny_families.write(olmo, tmp_path / "olmo.gguf"), Shard(0, 3, 3), exchanges[0])


def test_an_exchange_of_another_rank_is_refused(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", {}, default="F32")
    spec = make_spec(engine="onnx", model_path=str(path), shard=Shard(0, LAYERS, LAYERS), rank=1, rank_count=2)
    with pytest.raises(EngineError, match="exchange of another"):
        OnnxStage().load(spec, lambda _: None, ALONE)


def test_inner_sizes_that_do_not_fit_are_damage(tmp_path: Path) -> None:
    tiny = FAMILIES["llama"]
    odd = tiny._replace(shapes=tiny.shapes | {"ffn_gate.weight": (80, tiny_families.HIDDEN)})
    path = tiny_families.write(odd, tmp_path / "odd.gguf")
    with memory_exchanges(2) as exchanges, pytest.raises(CheckpointError, match=r"ffn_gate.weight' measures"):
        stage_of(path, Shard(0, 3, 3), exchanges[0])


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_rank_that_is_lost_in_the_middle_of_a_step_ends_it(tokens: int, tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", {}, default="Q4_0")
    with channel_exchanges(2) as exchanges:
        stage = stage_of(path, Shard(0, LAYERS, LAYERS), exchanges[0])

        def take_part_and_go() -> None:
            for _ in range(3):
                exchanges[1].add_up(np.zeros((tokens, 256), np.float32))
            exchanges[1].close()

        outcome = in_thread(lambda: stage.run([piece(0, 0, tokens)], TOKENS[:tokens]))
        in_thread(take_part_and_go)
        assert isinstance(outcome.get(timeout=10), LinkBrokenError)
