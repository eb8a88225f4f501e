"""What the CPU's `GroupQueryAttention` honours, against plain arithmetic: what the graph relies on, and what not.

A new version of ONNX Runtime that changes one of these is a reason to look at docs/decisions/0007-one-graph-builder.md.
"""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

HEADS, KV_HEADS, HEAD, ROOM, TURNED = 4, 2, 32, 64, 16
INPUTS = (
    "query", "key", "value", "keys", "values", "ends", "longest", "cosines", "sines", "positions", "bias", "sinks",
    "key_scale", "value_scale", "query_norm", "key_norm",
)  # fmt: skip
GENERATOR = np.random.default_rng(5)
STEPS = {"decoding": ([20], 1), "a chunk": ([20], 5), "a prompt": ([0], 30), "several decode": ([20, 3, 11], 1)}


def floats(*shape: int) -> np.ndarray:
    return GENERATOR.standard_normal(shape).astype(np.float32)


def feed_of(pasts: list[int], count: int, turned: int = HEAD) -> dict[str, np.ndarray]:
    """One step of `count` tokens for each sequence, of which so many are in the cache."""
    angles = np.outer(np.arange(ROOM), 10000.0 ** (-np.arange(0, turned, 2) / turned))
    totals = np.array(pasts) + count
    batch = len(pasts)
    return {
        "query": floats(batch, count, HEADS * HEAD),
        "key": floats(batch, count, KV_HEADS * HEAD),
        "value": floats(batch, count, KV_HEADS * HEAD),
        "keys": floats(batch, KV_HEADS, ROOM, HEAD),
        "values": floats(batch, KV_HEADS, ROOM, HEAD),
        "ends": (totals - 1).astype(np.int32),
        "longest": np.array([totals.max()], np.int32),
        "cosines": np.cos(angles).astype(np.float32),
        "sines": np.sin(angles).astype(np.float32),
    }


def model_of(feed: dict[str, np.ndarray], attributes: dict[str, Any]) -> bytes:
    inputs = [name if name in feed else "" for name in INPUTS]
    while not inputs[-1]:
        inputs.pop()
    node = helper.make_node(
        "GroupQueryAttention", inputs, ["result", "new_keys", "new_values"], domain="com.microsoft",
        num_heads=HEADS, kv_num_heads=KV_HEADS, **({"do_rotary": 1} | attributes),
    )  # fmt: skip
    kinds = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in feed.items()}
    outputs = {"result": kinds["query"], "new_keys": kinds["keys"], "new_values": kinds["values"]}
    graph = helper.make_graph(
        [node],
        "step",
        [helper.make_tensor_value_info(name, kind, feed[name].shape) for name, kind in kinds.items()],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def opened(feed: dict[str, np.ndarray], attributes: dict[str, Any], optimised: str = "") -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if optimised:
        options.optimized_model_filepath = optimised
    return onnxruntime.InferenceSession(model_of(feed, attributes), options, providers=["CPUExecutionProvider"])


def run(feed: dict[str, np.ndarray], **attributes: Any) -> np.ndarray:
    """[batch, tokens, heads, head size], with the cache written in place."""
    binding = (session := opened(feed, attributes)).io_binding()
    for name, value in feed.items():
        shared = onnxruntime.OrtValue.ortvalue_from_numpy(value.copy())
        binding.bind_ortvalue_input(name, shared)
        if name in {"keys", "values"}:
            binding.bind_ortvalue_output(f"new_{name}", shared)
    binding.bind_output("result")
    session.run_with_iobinding(binding)
    result = binding.get_outputs()[-1].numpy()
    return result.reshape(*result.shape[:2], HEADS, HEAD)


def expected(feed: dict[str, np.ndarray], **attributes: Any) -> np.ndarray:
    batch, count = feed["query"].shape[:2]
    result = np.empty((batch, count, HEADS, HEAD))
    for row in range(batch):
        past = int(feed["ends"][row]) + 1 - count
        query, key = (
            turned(feed[name][row].reshape(count, -1, HEAD), past, feed, attributes) for name in ("query", "key")
        )
        value = feed["value"][row].reshape(count, -1, HEAD)
        keys, values = (
            np.concatenate([feed[name][row, :, :past].swapaxes(0, 1), new])
            for name, new in (("keys", key), ("values", value))
        )
        for head in range(HEADS):
            shared = head // (HEADS // KV_HEADS)
            odds = attended(query[:, head], keys[:, shared], past, attributes)
            sink = np.exp(feed["sinks"][head]) if "sinks" in feed else 0.0
            result[row, :, head] = odds / (odds.sum(-1, keepdims=True) + sink) @ values[:, shared]
    return result


def attended(query: np.ndarray, keys: np.ndarray, past: int, attributes: dict[str, Any]) -> np.ndarray:
    scores = query.astype(np.float64) @ keys.T.astype(np.float64) * attributes.get("scale", HEAD**-0.5)
    cap = attributes.get("softcap")
    scores = scores if cap is None else cap * np.tanh(scores / cap)
    reader, read = np.arange(past, past + len(query))[:, np.newaxis], np.arange(len(keys))
    seen = (read <= reader) & (read > reader - attributes.get("local_window_size", ROOM))
    return np.where(seen, np.exp(scores), 0.0)


def turned(values: np.ndarray, past: int, feed: dict[str, np.ndarray], attributes: dict[str, Any]) -> np.ndarray:
    if not attributes.get("do_rotary", 1):
        return values
    half = feed["cosines"].shape[1]
    cosines, sines = (feed[name][past : past + len(values), np.newaxis] for name in ("cosines", "sines"))
    if attributes.get("rotary_interleaved"):
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    result = values.copy()
    result[..., first] = values[..., first] * cosines - values[..., second] * sines
    result[..., second] = values[..., second] * cosines + values[..., first] * sines
    return result


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"rotary_interleaved": 1},
        {"do_rotary": 0},
        {"scale": 0.3},
        {"softcap": 2.0},
        {"local_window_size": 8},
        {"local_window_size": 8, "softcap": 2.0, "scale": 0.3, "rotary_interleaved": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("extra", ["plain", "sinks", "partly turned"])
def test_what_is_honoured(step, attributes, extra):
    pasts, count = STEPS[step]
    feed = feed_of(pasts, count, TURNED if extra == "partly turned" else HEAD)
    if not attributes.get("do_rotary", 1):
        del feed["cosines"], feed["sines"]
    if extra == "sinks":
        feed["sinks"] = floats(HEADS)
    np.testing.assert_allclose(run(feed, **attributes), expected(feed, **attributes), atol=2e-6)


def test_sequences_that_begin_together_may_have_many_tokens():
    feed = feed_of([0, 0], 5)
    np.testing.assert_allclose(run(feed), expected(feed), atol=2e-6)


@pytest.mark.parametrize("pasts", [[20, 3], [20, 20]])
def test_several_sequences_that_go_on_have_one_token_each(pasts):
    with pytest.raises(Exception, match="batch_size must be 1 when sequence_length > 1 and past context is given"):
        run(feed_of(pasts, 5))


def test_norms_of_queries_and_keys_are_not_its_work():
    with pytest.raises(Exception, match="q_norm_weight / k_norm_weight inputs are not supported"):
        run(feed_of([20], 1) | {"query_norm": floats(HEAD), "key_norm": floats(HEAD)})


def test_a_head_of_another_size_is_refused():
    with pytest.raises(Exception, match="must be <= head_size / 2 and a multiple of 8"):
        run(feed_of([20], 1, turned=24))


def test_a_cache_of_halves_beside_queries_in_float32_is_converted_whole_at_every_step(tmp_path):
    """So it saves nothing: there is no kernel for it, and ONNX Runtime puts conversions around. There is one where all
    is of halves (`test_cache_in_halves`).
    """
    feed = feed_of([20], 1)
    halves = feed | {name: feed[name].astype(np.float16) for name in ("keys", "values")}
    opened(halves, {}, str(tmp_path / "halves.onnx"))
    operators = [node.op_type for node in onnx.load(tmp_path / "halves.onnx").graph.node]
    assert operators == ["Cast", "Cast", "GroupQueryAttention", "Cast", "Cast"]


SCALES_OF_BYTES = {"PER_TENSOR": (1,), "PER_CHANNEL": (KV_HEADS, 1, HEAD)}


def bytes_of(feed: dict[str, np.ndarray], grain: str) -> tuple[dict[str, np.ndarray], dict[str, str | int]]:
    """The feed with a cache of bytes, and what the operator has to be told of it. Scales differ by up to a half."""
    shape = SCALES_OF_BYTES[grain]
    scales = {kind: (4 / 127 * GENERATOR.uniform(0.8, 1.2, shape)).astype(np.float32) for kind in ("key", "value")}
    packed = dict(feed)
    for kind, scale in scales.items():
        packed[f"{kind}s"] = np.clip(np.round(feed[f"{kind}s"] / scale), -127, 127).astype(np.int8)
        packed[f"{kind}_scale"] = scale
    return packed, {"k_quant_type": grain, "v_quant_type": grain, "kv_cache_bit_width": 8}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("grain", SCALES_OF_BYTES)
def test_a_cache_of_bytes_is_computed_as_it_is(step, grain, tmp_path):
    """Its error is that of rounding keys and values, of which the largest is 127 steps."""
    pasts, count = STEPS[step]
    packed, attributes = bytes_of(feed := feed_of(pasts, count), grain)
    plain = feed | {kind: packed[kind] * packed[f"{kind[:-1]}_scale"] for kind in ("keys", "values")}
    np.testing.assert_allclose(run(packed, **attributes), expected(plain), atol=8 / 127)
    opened(packed, attributes, str(tmp_path / "bytes.onnx"))
    assert [node.op_type for node in onnx.load(tmp_path / "bytes.onnx").graph.node] == ["GroupQueryAttention"]


def test_what_is_too_large_for_a_cache_of_bytes_is_cut_off():
    """Static scales may be too small for a text; then a value becomes the largest that there is, of its sign."""
    packed, attributes = bytes_of(feed_of([20], 1), "PER_CHANNEL")
    packed["value"][...] = np.where(np.arange(packed["value"].size) % 2, 100, -100)
    binding = (session := opened(packed, attributes)).io_binding()
    held = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value.copy()) for name, value in packed.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    for name in ("keys", "values"):
        binding.bind_ortvalue_output(f"new_{name}", held[name])
    binding.bind_output("result")
    session.run_with_iobinding(binding)
    written = held["values"].numpy()[0, :, 20].reshape(-1)
    assert set(written[0::2].tolist()) == {-128}
    assert set(written[1::2].tolist()) == {127}
