"""A folder from the Hugging Face hub is a model like any other: GGUF's words, and no byte converted."""

import json
from typing import Any

import gguf
import numpy as np
import pytest
from hub_folders import LLAMA, bfloat16, llama_tensors, write_folder

from covey.checkpoints.card import card_from_header
from covey.checkpoints.checkpoint import CheckpointError, TensorReader
from covey.checkpoints.hub_config import family_of, llama3_divisors, text_config, translate
from covey.checkpoints.hub_families import ENDS, FAMILIES
from covey.checkpoints.opening import open_checkpoint, weight_files
from covey.checkpoints.quantization import dequantize
from covey.schema.ids import ModelId
from covey.schema.model import FileSource

SIZES = LLAMA | {"head_dim": 16}


def metadata_of(**config: Any) -> dict[str, Any]:
    whole = SIZES | config
    return translate(text_config(whole), family_of(whole)).metadata


def values(path, name: str) -> np.ndarray:
    entry = open_checkpoint(path).tensors[name]
    with TensorReader(path) as reader:
        return dequantize(entry, reader.read(entry))


# ---- names ----


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_names_are_those_of_the_reference(family):
    """Which of the hub's names is which of GGUF's is a fact that the `gguf` package keeps a table of."""
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == FAMILIES[family].architecture)
    reference = gguf.get_tensor_name_map(architecture, 3)
    for source, target in FAMILIES[family].layer.items():
        # The reference is asked when all experts are one tensor already, and knows nothing of MLX's names for these.
        known = reference.get_name(f"model.layers.2.{source.replace('.*', '')}")
        if ".experts.gate_up_proj" not in source and "switch_mlp" not in source:
            assert known == f"blk.2.{target}", source
    for source, target in ENDS.items():
        if (family, source) == ("gemma2", "lm_head"):
            continue  # always tied
        assert reference.get_name(source if source == "lm_head" else f"model.{source}") == target


def test_a_llama_of_two_shards(tmp_path):
    tensors = llama_tensors()
    names = list(tensors)
    halves = ({name: tensors[name] for name in names[:9]}, {name: bfloat16(tensors[name]) for name in names[9:]})
    path = write_folder(tmp_path / "model", LLAMA, *halves)
    header = open_checkpoint(path)
    assert len(header.tensors) == len(tensors)
    assert header.file_bytes == sum(file.stat().st_size for file in weight_files(path))
    assert np.array_equal(values(path, "blk.0.attn_q.weight"), tensors["model.layers.0.self_attn.q_proj.weight"])
    expected = bfloat16(tensors["model.layers.1.mlp.down_proj.weight"]).values
    assert np.array_equal(values(path, "blk.1.ffn_down.weight"), expected)
    card = card_from_header(header, ModelId("it"), FileSource(str(path)))
    assert (card.architecture, card.layer_count, card.vocabulary_size, card.head_size) == ("llama", 2, 100, 16)
    assert card.context_length_max == 512


def test_only_a_tensor_s_own_bytes_are_read(tmp_path):
    tensors = llama_tensors()
    path = write_folder(tmp_path / "model", LLAMA, tensors)
    entry = open_checkpoint(path).tensors["blk.0.ffn_up.weight"]
    content = bytearray((path / "model.safetensors").read_bytes())
    kept = bytes(content[entry.offset : entry.offset + entry.byte_count])
    (path / "model.safetensors").write_bytes(bytes(entry.offset) + kept)  # all before is gone, all behind is not there
    with TensorReader(path) as reader:
        assert reader.read(entry).tobytes() == kept


def test_an_output_that_is_tied_is_not_stored_twice(tmp_path):
    tensors = llama_tensors() | {"lm_head.weight": np.zeros((100, 64), np.float32)}
    path = write_folder(tmp_path / "tied", LLAMA, tensors)
    assert "output.weight" not in open_checkpoint(path).tensors
    path = write_folder(tmp_path / "own", LLAMA | {"tie_word_embeddings": False}, tensors)
    assert open_checkpoint(path).tensors["output.weight"].shape == (100, 64)


def test_what_sees_pictures_is_left_out(tmp_path):
    tensors = {f"language_model.{name}": each for name, each in llama_tensors().items()}
    tensors |= {"vision_tower.patch.weight": np.zeros((2, 2), np.float32)}
    config = {"model_type": "gemma3", "text_config": {**LLAMA, "model_type": "llama"}}
    path = write_folder(tmp_path / "model", config, tensors)
    assert open_checkpoint(path).tensors.keys() == {
        *(f"blk.{layer}.{name}.weight" for layer in range(2) for name in FAMILIES["llama"].layer.values()),
        "token_embd.weight", "output_norm.weight",
    }  # fmt: skip


def test_experts_are_put_one_after_another(tmp_path):
    config = SIZES | {
        "model_type": "qwen3_moe",
        "num_experts": 12,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
    }
    generator = np.random.default_rng(2)
    experts = [generator.standard_normal((8, 64)).astype(np.float32) for _ in range(12)]
    tensors = {f"model.layers.0.mlp.experts.{i}.gate_proj.weight": each for i, each in reversed([*enumerate(experts)])}
    path = write_folder(tmp_path / "model", config, tensors | llama_ends())
    entry = open_checkpoint(path).tensors["blk.0.ffn_gate_exps.weight"]
    assert entry.shape == (12, 8, 64)
    assert entry.byte_count == 12 * 8 * 64 * 4
    assert np.array_equal(values(path, "blk.0.ffn_gate_exps.weight"), np.stack(experts))
    del tensors["model.layers.0.mlp.experts.4.gate_proj.weight"]
    path = write_folder(tmp_path / "lacking", config, tensors | llama_ends())
    with pytest.raises(CheckpointError, match=r"lacks some of the experts of 'blk.0.ffn_gate_exps'"):
        open_checkpoint(path)


def llama_ends() -> dict[str, np.ndarray]:
    return {name: each for name, each in llama_tensors().items() if "layers" not in name}


def test_experts_that_awq_quantised(tmp_path):
    awq = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    config = SIZES | {"model_type": "mixtral", "num_local_experts": 3, "quantization_config": awq}
    generator = np.random.default_rng(4)
    tensors: dict[str, np.ndarray] = {}
    for expert in range(3):
        at = f"model.layers.0.block_sparse_moe.experts.{expert}.w1"
        tensors[f"{at}.qweight"] = generator.integers(-(2**31), 2**31, (64, 2), np.int64).astype(np.int32)
        tensors[f"{at}.qzeros"] = generator.integers(-(2**31), 2**31, (2, 2), np.int64).astype(np.int32)
        tensors[f"{at}.scales"] = generator.standard_normal((2, 16)).astype(np.float16)
    together = values(write_folder(tmp_path / "all", config, tensors | llama_ends()), "blk.0.ffn_gate_exps.weight")
    assert together.shape == (3, 16, 64)
    for expert in range(3):
        alone = {
            name.replace(f"experts.{expert}", "experts.0"): each
            for name, each in tensors.items()
            if f"experts.{expert}" in name
        }
        path = write_folder(tmp_path / str(expert), config, alone | llama_ends())
        assert np.array_equal(values(path, "blk.0.ffn_gate_exps.weight")[0], together[expert])


def test_gpt_oss_weaves_two_matrices_into_one(tmp_path):
    config = SIZES | {"model_type": "gpt_oss", "num_local_experts": 2, "sliding_window": 128}
    config |= {"quantization_config": {"quant_method": "mxfp4"}}
    generator = np.random.default_rng(5)
    at = "model.layers.1.mlp.experts"
    blocks = generator.integers(0, 256, (2, 10, 2, 16), np.uint8)
    scales = generator.integers(120, 130, (2, 10, 2), np.uint8)
    bias = generator.standard_normal((2, 10)).astype(np.float32)
    tensors = {
        f"{at}.gate_up_proj_blocks": blocks, f"{at}.gate_up_proj_scales": scales,
        f"{at}.gate_up_proj_bias": bfloat16(bias),
        f"{at}.down_proj_blocks": blocks, f"{at}.down_proj_scales": scales,
        "model.layers.1.self_attn.sinks": bfloat16(np.arange(4.0)),
    }  # fmt: skip
    path = write_folder(tmp_path / "model", config, tensors | llama_ends())
    whole = values(path, "blk.1.ffn_down_exps.weight")
    assert whole.shape == (2, 10, 64)
    assert np.array_equal(values(path, "blk.1.ffn_gate_exps.weight"), whole[:, 0::2])
    assert np.array_equal(values(path, "blk.1.ffn_up_exps.weight"), whole[:, 1::2])
    assert np.array_equal(values(path, "blk.1.ffn_up_exps.bias"), bfloat16(bias).values[:, 1::2])
    assert np.array_equal(values(path, "blk.1.attn_sinks.weight"), np.arange(4))


def test_gpt_oss_in_full_precision_is_transposed(tmp_path):
    generator = np.random.default_rng(6)
    joined, down = generator.standard_normal((2, 64, 10)), generator.standard_normal((2, 5, 64))
    at = "model.layers.0.mlp.experts"
    tensors = {f"{at}.gate_up_proj": bfloat16(joined), f"{at}.down_proj": bfloat16(down)}
    config = SIZES | {"model_type": "gpt_oss", "num_local_experts": 2}
    path = write_folder(tmp_path / "model", config, tensors | llama_ends())
    turned = bfloat16(joined).values.swapaxes(1, 2)
    assert np.array_equal(values(path, "blk.0.ffn_gate_exps.weight"), turned[:, 0::2])
    assert np.array_equal(values(path, "blk.0.ffn_up_exps.weight"), turned[:, 1::2])
    assert np.array_equal(values(path, "blk.0.ffn_down_exps.weight"), bfloat16(down).values.swapaxes(1, 2))
    tensors[f"{at}.down_proj"] = bfloat16(down[0])
    with pytest.raises(CheckpointError, match=r"experts.down_proj' measures \(5, 64\)"):
        open_checkpoint(write_folder(tmp_path / "flat", config, tensors | llama_ends()))


def test_mlx_with_another_precision_for_one_module(tmp_path):
    golden = np.load(f"{__file__.rsplit('/', 1)[0]}/golden/mlx.npz")
    quantization = {"group_size": 64, "bits": 4, "model.layers.0.mlp.down_proj": {"group_size": 32, "bits": 6}}
    tensors = llama_ends()
    for module, key in (("up_proj", "4.64"), ("down_proj", "6.32")):
        for name, kind in (("weight", "words"), ("scales", "scales"), ("biases", "biases")):
            tensors[f"model.layers.0.mlp.{module}.{name}"] = golden[f"{key}.{kind}"]
    path = write_folder(tmp_path / "model", SIZES | {"quantization": quantization}, tensors)
    types = {name: each.type for name, each in open_checkpoint(path).tensors.items()}
    assert types["blk.0.ffn_up.weight"] == "MLX_4"
    assert types["blk.0.ffn_down.weight"] == "MLX_6"
    assert np.abs(values(path, "blk.0.ffn_down.weight") - golden["6.32.values"]).max() < 1e-6


# ---- settings ----


def test_the_words_of_a_llama():
    assert metadata_of(rope_theta=500000.0) == {
        "general.architecture": "llama",
        "covey.rotary_interleaved": False,
        "llama.block_count": 2,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": 100,
        "llama.rope.freq_base": 500000.0,
        "llama.rope.dimension_count": 16,
    }


def test_newer_configs_say_the_same_elsewhere():
    old = metadata_of(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 4})
    assert old == metadata_of(rope_parameters={"rope_theta": 5e5, "rope_type": "linear", "factor": 4})
    assert old["llama.rope.scaling.factor"] == 4.0


def test_llama_3_states_what_gguf_has_as_a_tensor(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192}
    path = write_folder(tmp_path / "model", SIZES | {"rope_scaling": scaling, "rope_theta": 5e5}, llama_tensors())
    actual = values(path, "rope_freqs.weight")
    expected = []  # as the paper's reference code does it, one by one
    for i in range(8):
        wave = 2 * np.pi * 5e5 ** (2 * i / 16)
        if wave < 8192 / 4:
            expected.append(1.0)
        elif wave > 8192:
            expected.append(8.0)
        else:
            smooth = (8192 / wave - 1) / 3
            expected.append(1 / ((1 - smooth) / 8 + smooth))
    assert 1.0 < expected[4] < 8.0 or 1.0 < expected[5] < 8.0
    assert np.allclose(actual, expected, rtol=1e-6)
    assert llama3_divisors(scaling, 5e5, 128).shape == (64,)


def test_gemma_s_windows_norms_and_caps():
    found = metadata_of(
        model_type="gemma2", hidden_activation="gelu_pytorch_tanh", sliding_window=4096, query_pre_attn_scalar=256,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
    )  # fmt: skip
    assert found["covey.norm_offset"] == 1.0
    assert found["gemma2.attention.sliding_window"] == 4096
    assert found["gemma2.attention.sliding_window_pattern"] == [True, False]
    assert found["gemma2.attention.scale"] == 1 / 16
    assert found["gemma2.attn_logit_softcapping"] == 50.0
    found = metadata_of(
        model_type="gemma3_text",
        hidden_act=None,
        num_hidden_layers=7,
        rope_scaling={"rope_type": "linear", "factor": 8},
    )
    assert found["gemma3.attention.sliding_window_pattern"] == [True] * 5 + [False, True]
    assert found["gemma3.rope.freq_base_swa"] == 10_000
    assert found["gemma3.rope.freq_base"] == 1_000_000


def test_windows_are_used_where_they_are_asked_for():
    assert "qwen2.attention.sliding_window" not in metadata_of(model_type="qwen2", sliding_window=64)
    found = metadata_of(model_type="qwen2", sliding_window=64, use_sliding_window=True, max_window_layers=1)
    assert found["qwen2.attention.sliding_window_pattern"] == [False, True]
    assert metadata_of(model_type="mistral", sliding_window=64)["llama.attention.sliding_window_pattern"] == [
        True,
        True,
    ]
    kinds = ["full_attention", "sliding_attention"]
    found = metadata_of(model_type="gpt_oss", sliding_window=128, layer_types=kinds)
    assert found["gpt-oss.attention.sliding_window_pattern"] == [False, True]


def test_the_layers_that_do_not_rotate():
    assert metadata_of(model_type="smollm3", num_hidden_layers=5)["covey.rotary_layers"] == [True] * 3 + [False, True]
    assert metadata_of(model_type="smollm3", no_rope_layers=[0, 1])["covey.rotary_layers"] == [False, True]


def test_other_families_numbers():
    granite = metadata_of(
        model_type="granite", embedding_multiplier=12.0, attention_multiplier=0.015625, residual_multiplier=0.22,
        logits_scaling=8.0,
    )  # fmt: skip
    keys = ("embedding_scale", "attention.scale", "residual_scale", "logit_scale")
    assert [granite[f"granite.{key}"] for key in keys] == [12.0, 0.015625, 0.22, 8.0]
    moe = metadata_of(
        model_type="qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True
    )
    assert moe["qwen3moe.expert_count"] == 8
    assert moe["qwen3moe.expert_feed_forward_length"] == 32
    assert moe["qwen3moe.expert_weights_norm"] is True
    long = {"type": "longrope", "long_factor": [1.0] * 8, "short_factor": [2.0] * 8}
    phi = SIZES | {"model_type": "phi3", "rope_scaling": long, "original_max_position_embeddings": 64}
    translated = translate(phi, family_of(phi))
    assert translated.tensors["rope_factors_short.weight"].tolist() == [2.0] * 8
    assert translated.metadata["phi3.rope.scaling.attn_factor"] == pytest.approx((1 + np.log(8) / np.log(64)) ** 0.5)
    yarn = metadata_of(
        model_type="gpt_oss",
        rope_scaling={"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
    )
    assert yarn["gpt-oss.rope.scaling.original_context_length"] == 4096


# ---- refusals ----


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'; known are gemma2"),
        ({"model_type": None}, "states no model_type"),
        ({"model_type": []}, "model_type"),
        ({"hidden_size": "64"}, "'hidden_size' as '64'"),
        ({"hidden_size": 64.5}, "'hidden_size' as 64.5"),
        ({"num_hidden_layers": -1}, "'num_hidden_layers' as -1"),
        ({"num_hidden_layers": True}, "'num_hidden_layers' as True"),
        ({"rms_norm_eps": None}, "lacks 'rms_norm_eps'"),
        (
            {"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "attn_logit_softcapping": None},
            "lacks 'attn_logit_softcapping'",
        ),
        ({"hidden_act": "relu"}, "activation 'relu', where this family has silu"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "by 'dynamic'; known are default, linear"),
        ({"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
        ({"rope_scaling": [1]}, "'rope_scaling' that is no object"),
        ({"sliding_window": 8, "layer_types": ["full_attention"]}, "'layer_types' that is not one value for each"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised by 'fp8'; known are awq, gptq, mxfp4 and MLX's"),
        ({"quantization_config": {"quant_method": "awq", "bits": 3, "group_size": 64}}, "to 3 bits; only 4"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 0}}, "'group_size' of its quantiz"),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "GEMV"}},
            "for 'gemv'; only 'gemm'",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True}},
            "reordered its columns",
        ),
        ({"quantization": {"group_size": 64, "bits": 4, "mode": "nvfp4"}}, "in the mode 'nvfp4'"),
        ({"eos_token_id": "end"}, "'eos_token_id' is 'end'"),
    ],
)
def test_a_config_that_can_not_be_followed(config, message, tmp_path):
    path = write_folder(tmp_path / "model", LLAMA | config, llama_tensors())
    with pytest.raises(CheckpointError, match=message) as refusal:
        open_checkpoint(path)
    assert str(refusal.value).startswith(str(path))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ({"model.layers.0.self_attn.rotary.weight": 4}, "'model.layers.0.self_attn.rotary.weight', which is not known"),
        ({"classifier.weight": 4}, "'classifier.weight', which is not known of the architecture 'llama'"),
        ({"model.layers.0.mlp.up_proj.scales": 4}, "quantised, but the config.json does not say how"),
        ({"model.layers.0.mlp.up_proj.g_idx": 4}, r"\(g_idx, weight\) don't make a matrix"),
    ],
)
def test_a_tensor_that_does_not_belong(tensor, message, tmp_path):
    more = {name: np.zeros((size, size), np.float32) for name, size in tensor.items()}
    path = write_folder(tmp_path / "model", LLAMA, llama_tensors() | more)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_a_type_that_can_not_be_used(tmp_path):
    tensors = llama_tensors() | {"model.norm.weight": np.zeros(64, np.int64)}
    with pytest.raises(CheckpointError, match="of the type I64, which can't be used; known are F32, F16, BF16"):
        open_checkpoint(write_folder(tmp_path / "model", LLAMA, tensors))


def test_shards_that_are_missing_or_lie(tmp_path):
    tensors = llama_tensors()
    names = list(tensors)
    first, second = ({name: tensors[name] for name in part} for part in (names[:9], names[9:]))
    path = write_folder(tmp_path / "model", LLAMA, first, second)
    index = path / "model.safetensors.index.json"
    stated = json.loads(index.read_text())
    (path / "model-00002-of-00002.safetensors").rename(path / "away")
    with pytest.raises(CheckpointError, match=r"file model-00002-of-00002.safetensors is missing"):
        open_checkpoint(path)
    (path / "away").rename(path / "model-00002-of-00002.safetensors")
    for changed, message in (
        (
            {"model.layers.9.mlp.up_proj.weight": "model-00001-of-00002.safetensors"},
            "'model.layers.9.mlp.up_proj.weight' is not in",
        ),
        ({"x": "../other.safetensors"}, "names '../other.safetensors', which is no safetensors file of this folder"),
        ({"x": "/etc/passwd"}, "which is no safetensors file of this folder"),
        ({"x": "model.bin"}, "which is no safetensors file of this folder"),
        ({"x": 3}, "has no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": stated["weight_map"] | changed}))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="is no JSON"):
        open_checkpoint(path)


def test_folders_that_are_no_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config.json, so it is no folder of a model"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"in pytorch_model.bin, a format that runs code when it is read"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="may be in a format that runs code"):
        open_checkpoint(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="name the folder that holds it"):
        open_checkpoint(tmp_path / "model.safetensors")
