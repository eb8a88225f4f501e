"""A KV cache in 16-bit floats: the operator as it is given, every family, the demo model, and what is too large.

Values lose at most half of a thousandth by it, and keys a whole one, since they are turned; float32's logits are the
measure.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import test_attention_operator as operator
import tiny_families
from test_attention_operator import HEADS, STEPS, TURNED, feed_of, floats, opened, run
from tiny_families import CONTEXT, FAMILIES, TOKENS
from tiny_llama import HEAD, KV_HEADS, LAYERS, write_tiny_llama

from covey.engine.contract import ALONE, Copy, Piece
from covey.engine.onnx.attention import HALVES_MAX
from covey.engine.onnx.session import KvCache
from covey.engine.onnx.stage import OnnxStage
from covey.schema.model import Shard
from tests.engine.harness import make_spec

PROMPTS = [prompt["token_ids"] for prompt in json.loads((Path(__file__).parent / "prompts.json").read_text())]
IDS = tiny_families.token_ids()
NEAR_FLOATS = 5e-3  # of the logits' range: what rounding keys and values may change
NEAR_HALVES = 5e-4  # of it, between steps of other sizes: a sum in another order may round to the next half


# ---- the operator ----


def halves(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: each.astype(np.float16) if each.dtype == np.float32 else each for name, each in feed.items()}


def widened(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: each.astype(np.float32) if each.dtype == np.float16 else each for name, each in feed.items()}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("head", [32, 64, 128])
@pytest.mark.parametrize(
    "attributes",
    [{}, {"softcap": 2.0}, {"local_window_size": 8, "softcap": 2.0, "scale": 0.3, "rotary_interleaved": 1}],
    ids=str,
)
@pytest.mark.parametrize("extra", ["plain", "sinks", "partly turned"])
def test_the_operator_computes_with_halves(
    step: str, head: int, attributes: dict[str, Any], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator, "HEAD", head)
    pasts, count = STEPS[step]
    feed = feed_of(pasts, count, TURNED if extra == "partly turned" else head)
    if extra == "sinks":
        feed["sinks"] = floats(HEADS)
    given = halves(feed)
    expected = operator.expected(widened(given), **attributes)
    np.testing.assert_allclose(run(given, **attributes), expected, atol=8e-3)


def test_nothing_is_converted_around_it(tmp_path: Path) -> None:
    """There is a kernel for it, unlike for a cache of halves beside queries in float32."""
    opened(halves(feed_of([20], 1)), {}, str(tmp_path / "halves.onnx"))
    assert [node.op_type for node in onnx.load(tmp_path / "halves.onnx").graph.node] == ["GroupQueryAttention"]


@pytest.mark.parametrize("step", STEPS)
def test_scores_far_beyond_what_a_half_holds_are_right(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It adds them up in float32: 128 products of 100 and 20,000 are 2e8, and the largest alone counts."""
    monkeypatch.setattr(operator, "HEAD", 128)
    pasts, count = STEPS[step]
    feed = feed_of(pasts, count)
    for name, size in (("query", 100), ("key", 20_000), ("keys", 20_000)):
        feed[name] = size * np.sign(feed[name])
    result = run(halves(feed), scale=1.0)
    assert np.isfinite(result).all()
    known = np.concatenate([feed["value"].ravel(), feed["values"].ravel()]).astype(np.float16)
    assert np.isin(result.astype(np.float16), known).mean() > 0.9


# ---- stages ----


def loaded(path: Path, shard: Shard, kv_cache: str = "f16", **options: str) -> OnnxStage:
    stage = OnnxStage()
    spec = make_spec(
        engine="onnx",
        engine_options={"kv_cache": kv_cache, **options},
        model_path=str(path),
        shard=shard,
        context_length=CONTEXT,
        slot_count=3,
        thread_count=2,
    )
    stage.load(spec, lambda _: None, ALONE)
    return stage


def piece(slot: int, position: int, token_count: int = 1, copy: Copy | None = None) -> Piece:
    return Piece(slot, position, token_count, wants_logits=True, copy=copy)


def told(stages: list[OnnxStage], *pieces: Piece) -> np.ndarray:
    """Every piece reads `IDS` from its position on."""
    values = np.concatenate([IDS[each.position : each.position + each.token_count] for each in pieces])
    for stage in stages:
        values = stage.run(pieces, values).copy()
    return values


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_what_it_says_with_floats(family: str, tmp_path: Path) -> None:
    """Token by token; and the same in chunks, beside others, from a copy of another slot, and in two stages."""
    layers = FAMILIES[family].layers
    path = tiny_families.write(FAMILIES[family], tmp_path / "tiny.gguf")
    golden = np.load(Path(__file__).parent / "goldens" / f"{family}.npz")["logits"]
    size = np.ptp(golden)
    stages = [loaded(path, Shard(start, end, layers)) for start, end in pairwise((0, layers // 2, layers))]
    alone = np.concatenate([told(stages, piece(0, at)) for at in range(TOKENS)])
    apart = np.abs(alone - golden).max()
    assert 0 < apart < NEAR_FLOATS * size

    def expect(actual: np.ndarray, positions: list[int]) -> None:
        assert np.abs(actual - alone[positions]).max() < NEAR_HALVES * size

    for start, end in pairwise((0, 7, 8, 24, 30)):
        expect(told(stages, piece(1, start, end - start)), [end - 1])
    expect(told(stages, piece(2, 20, 6, Copy(1, 0))), [25])
    expect(told(stages, piece(2, 26), piece(0, 13), piece(1, 30)), [26, 13, 30])
    whole = [loaded(path, Shard(0, layers, layers))]
    np.testing.assert_array_equal(told(whole, piece(0, 0, 20)), told(stages, piece(0, 0, 20)))


@pytest.mark.parametrize("name", ["attn_k", "attn_v"])
def test_what_is_too_large_for_a_half_does_not_become_nan(name: str, tmp_path: Path) -> None:
    """Keys near a million, of which turning makes more: the largest half that there is room for stands for them."""
    path = write_tiny_llama(
        tmp_path / "tiny.gguf",
        {},
        default="F32",
        extra={"tensors": {f"blk.1.{name}.bias": np.full(KV_HEADS * HEAD, 1e6, np.float32)}},
    )
    stage = loaded(path, Shard(0, LAYERS, LAYERS))
    logits = np.concatenate([told([stage], piece(0, 0, 20)), told([stage], piece(0, 20))])
    assert np.isfinite(logits).all()
    assert np.finfo(np.float16).max > HALVES_MAX * 2**0.5 * 1.4


def test_another_type_of_cache_is_loaded_anew(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", {}, default="F16")
    stage = loaded(path, shard := Shard(0, LAYERS, LAYERS))
    halved = told([stage], piece(0, 0, 20))
    spec = make_spec(
        engine="onnx", model_path=str(path), shard=shard, context_length=CONTEXT, slot_count=3, thread_count=2
    )
    stage.load(spec, lambda _: None, ALONE)
    full = told([stage], piece(0, 0, 20))
    np.testing.assert_array_equal(full, told([loaded(path, shard, "f32")], piece(0, 0, 20)))
    assert 0 < np.abs(full - halved).max() < NEAR_FLOATS * np.ptp(full)


def test_it_takes_half_the_memory() -> None:
    shape = (2, 3, 64, 32)
    full, halved = (KvCache(("keys",), shape, kind).slices(0, 2)["keys"] for kind in (np.float32, np.float16))
    assert (halved.shape, 2 * halved.nbytes) == (full.shape, full.nbytes)


# ---- the demo model ----


def test_the_demo_model_answers_as_with_floats(demo_model: Path) -> None:
    """Led along the same tokens in exact mode, where nothing else is rounded; each names the same next token."""
    agreed, apart = [], []
    full, halved = (loaded_whole(demo_model, kind) for kind in ("f32", "f16"))
    for prompt in PROMPTS[::4]:
        answer = greedy(full, prompt, 24)
        expected, actual = (lead(stage, [*prompt, *answer]) for stage in (full, halved))
        agreed.append(expected.argmax(-1) == actual.argmax(-1))
        apart.append(np.abs(expected - actual).max() / expected.std())
    print(f"top-1 agreement {np.concatenate(agreed).mean():.4f}, logits apart by {max(apart):.4f} of their spread")
    assert np.concatenate(agreed).mean() >= 0.98
    assert 0 < max(apart) < 0.05


def loaded_whole(path: Path, kv_cache: str) -> OnnxStage:
    stage = OnnxStage()
    spec = make_spec(
        engine="onnx", engine_options={"exact": "1", "kv_cache": kv_cache}, model_path=str(path),
        shard=Shard(0, 30, 30), context_length=256, slot_count=1, thread_count=2,
    )  # fmt: skip
    stage.load(spec, lambda _: None, ALONE)
    return stage


def greedy(stage: OnnxStage, prompt: list[int], count: int) -> list[int]:
    unread, position, answer = prompt, 0, []
    while len(answer) < count:
        logits = stage.run([piece(0, position, len(unread))], np.array(unread, np.int64))
        position += len(unread)
        unread = [int(logits[-1].argmax())]
        answer += unread
    return answer


def lead(stage: OnnxStage, tokens: list[int]) -> np.ndarray:
    """The logits after each token."""
    whole = Piece(0, 0, len(tokens), wants_logits=True, guess_count=len(tokens) - 1)
    return stage.run([whole], np.array(tokens, np.int64)).copy()
