"""Writes `goldens/FAMILY.npz`: what Hugging Face transformers says to the tiny checkpoints of `tiny_families.py`.

It needs `torch` and `transformers`, which the tests don't; run it in an environment of its own:

    pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0
    python tests/engine/onnx/make_family_goldens.py [FAMILY ...]

The weights are brought from GGUF's names and layouts to those of transformers, so an error in the engine's reading of
GGUF files would show.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tiny_families import (
    CONTEXT,
    EXPERT_FEED_FORWARD,
    FAMILIES,
    FEED_FORWARD,
    HIDDEN,
    LONG_FACTORS,
    SHORT_FACTORS,
    VOCABULARY,
    WINDOW,
    Tiny,
    tensors,
    token_ids,
    unpermuted,
)

GOLDENS = Path(__file__).parent / "goldens"
LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_q.": "self_attn.q_proj.",
    "attn_k.": "self_attn.k_proj.",
    "attn_v.": "self_attn.v_proj.",
    "attn_output": "self_attn.o_proj",
    "ffn_gate.": "mlp.gate_proj.",
    "ffn_up.": "mlp.up_proj.",
    "ffn_down.": "mlp.down_proj.",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.gate_exps",
    "ffn_up_exps": "mlp.up_exps",
    "ffn_down_exps": "mlp.down_exps",
}
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output.": "lm_head."}
GEMMA_NAMES = {"ffn_norm.weight": "pre_feedforward_layernorm.weight"}
PHI_NAMES = {"ffn_up.": "mlp.gate_up_proj."}
GPT_OSS_NAMES = {"attn_sinks.weight": "self_attn.sinks", "ffn_gate_inp": "mlp.router"}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 16,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "smollm3": ("SmolLM3", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "qwen3-yarn": ("Qwen3", {"rope_parameters": YARN}),
    "gemma2": (
        "Gemma2",
        {
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 32,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 32,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "phi3": (
        "Phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "phi3-long": (
        "Phi3",
        {
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "short_factor": list(SHORT_FACTORS),
                "long_factor": list(LONG_FACTORS),
                "attention_factor": 1.2,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "olmo2": ("Olmo2", {}),
    "olmo3": (
        "Olmo3",
        {
            "sliding_window": WINDOW,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "mixtral": (
        "Mixtral",
        {"intermediate_size": EXPERT_FEED_FORWARD, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3moe": (
        "Qwen3Moe",
        {
            "moe_intermediate_size": EXPERT_FEED_FORWARD,
            "num_experts": 20,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
        },
    ),
    "gpt-oss": (
        "GptOss",
        {
            "intermediate_size": EXPERT_FEED_FORWARD,
            "num_local_experts": 12,
            "num_experts_per_tok": 4,
            "sliding_window": WINDOW,
            "rope_parameters": YARN | {"truncate": False},
        },
    ),
    "granite": (
        "Granite",
        {
            "attention_multiplier": 0.4,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "logits_scaling": 4.0,
        },
    ),
}


def config(tiny: Tiny, kind: str, changes: dict[str, Any]) -> Any:
    """What the metadata of the GGUF file says, as transformers wants it said."""
    heads, kv_heads = tiny.heads
    common = {
        "hidden_size": HIDDEN,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": tiny.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": tiny.head_size,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tiny.tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attn_implementation": "eager",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    name = f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config"
    return getattr(transformers, name)(**(common | changes))


def state(tiny: Tiny) -> dict[str, torch.Tensor]:
    """The file's tensors by the names of transformers, in its layouts."""
    found: dict[str, torch.Tensor] = {}
    for name, content in tensors(tiny).items():
        if name in tiny.factors:
            continue
        found[renamed(tiny, name)] = torch.from_numpy(converted(tiny, name, content))
    if tiny.tied:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    return with_experts(tiny, found) if "expert_count" in tiny.metadata else found


def with_experts(tiny: Tiny, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gate and up are one tensor: one after the other, or interleaved and transposed in gpt-oss."""
    for layer in range(tiny.layers):
        begin = f"model.layers.{layer}.mlp."
        for kind in ("weight", "bias"):
            gate, up = (found.pop(f"{begin}{name}_exps.{kind}", None) for name in ("gate", "up"))
            down = found.pop(f"{begin}down_exps.{kind}", None)
            if gate is None or up is None or down is None:
                continue
            end = "_bias" if kind == "bias" else ""
            if tiny.architecture != "gpt-oss":
                joined = torch.cat([gate, up], 1)
            else:
                joined = torch.stack([gate, up], 2).flatten(1, 2)
                if kind == "weight":
                    joined, down = joined.transpose(1, 2), down.transpose(1, 2)
            found |= {f"{begin}experts.gate_up_proj{end}": joined, f"{begin}experts.down_proj{end}": down}
    return found


def renamed(tiny: Tiny, name: str) -> str:
    if not name.startswith("blk."):
        return replaced(name, NAMES)
    _, layer, inner = name.split(".", 2)
    names = LAYER_NAMES
    if tiny.architecture.startswith("gemma"):
        names = GEMMA_NAMES | {key: value for key, value in LAYER_NAMES.items() if key not in GEMMA_NAMES}
    if tiny.architecture == "phi3":
        names = LAYER_NAMES | PHI_NAMES
    if tiny.architecture == "gpt-oss":
        names = LAYER_NAMES | GPT_OSS_NAMES
    return f"model.layers.{layer}.{replaced(inner, names)}"


def replaced(name: str, names: dict[str, str]) -> str:
    begin = next((begin for begin in names if name.startswith(begin)), None)
    assert begin is not None, name
    return names[begin] + name.removeprefix(begin)


def converted(tiny: Tiny, name: str, content: np.ndarray) -> np.ndarray:
    if tiny.architecture.startswith("gemma") and name.endswith("norm.weight"):
        return content - 1
    return unpermuted(tiny, name, content)


def logits(family: str) -> np.ndarray:
    """[tokens, vocabulary]"""
    tiny = FAMILIES[family]
    kind, changes = CONFIGS[family]
    model = getattr(transformers, f"{kind}ForCausalLM")(config(tiny, kind, changes)).eval()
    model.load_state_dict(state(tiny), strict=True)
    with torch.no_grad():
        return model(torch.from_numpy(token_ids())[None], use_cache=False).logits[0].numpy()


def main() -> None:
    GOLDENS.mkdir(exist_ok=True)
    for family in sys.argv[1:] or FAMILIES:
        found = logits(family).astype(np.float32)
        np.savez_compressed(GOLDENS / f"{family}.npz", logits=found)
        print(family, found.shape, "spread", found.std())


if __name__ == "__main__":
    main()
