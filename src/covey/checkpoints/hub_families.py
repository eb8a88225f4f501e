"""How each family of models names its tensors in Hugging Face's checkpoints, and what GGUF calls them.

The names on the left are those of transformers' modules; of the right ones, and of which is which, the `gguf` package's
tensor map is the source. MLX stacks a mixture's experts under `switch_mlp`.
"""

from typing import Any, Final

from msgspec import Struct

ENDS: Final = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_ATTENTION: Final = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_QUERY_KEY_NORMS: Final = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_DENSE: Final = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_TWO_NORMS: Final = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_FOUR_NORMS: Final = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_EXPERTS: Final = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
_LLAMA: Final = _ATTENTION | _DENSE | _TWO_NORMS


def _switched(prefix: str) -> dict[str, str]:
    return {f"{prefix}.switch_mlp.{name}": to for name, to in _EXPERTS.items()}


def _numbered(prefix: str, names: dict[str, str]) -> dict[str, str]:
    """`*` is the expert's number."""
    return {f"{prefix}.experts.*.{name}": to for name, to in names.items()}


class Family(Struct, frozen=True):
    architecture: str  # GGUF's word
    layer: dict[str, str]  # a module of a layer, to GGUF's name behind `blk.N.`
    activations: tuple[str, ...] = ("silu", "swish")
    norm_offset: float = 0.0  # added to the weights of norms; GGUF files have it in the weights
    full_attention_every: int = 0  # layers; between them are those with a window, which all are if it is 0
    window_is_asked_for: bool = False  # by `use_sliding_window`; a stated window alone is not used
    rotates_some_layers: bool = False
    rope_base: float = 10_000.0  # where a config states none
    experts_norm: str = ""  # the key that says whether the weights of the chosen experts are made to add up to 1
    defaults: dict[str, Any] = {}  # of what configs leave out
    needed: tuple[str, ...] = ()  # numbers that a config could go without, though no model of the family does


_GEMMA_ACTIVATIONS: Final = ("gelu_pytorch_tanh", "gelu")  # early configs say gelu where the other is meant
_GEMMA3: Final = Family(
    "gemma3",
    _ATTENTION | _DENSE | _FOUR_NORMS | _QUERY_KEY_NORMS,
    _GEMMA_ACTIVATIONS,
    norm_offset=1.0,
    full_attention_every=6,
    rope_base=1_000_000.0,
    defaults={  # the configs of those that see pictures state only what differs from transformers' Gemma3TextConfig
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10_000.0,
        "sliding_window": 4096,
    },
)
_GEMMA2_NEEDS: Final = ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "sliding_window")
_MIXTRAL_EXPERTS: Final = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
_OLMO2_NORMS: Final = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_OLMO2: Final = _ATTENTION | _DENSE | _OLMO2_NORMS | _QUERY_KEY_NORMS

# By `model_type`.
FAMILIES: Final[dict[str, Family]] = {
    "llama": Family("llama", _LLAMA),
    "mistral": Family("llama", _LLAMA),
    "smollm3": Family("smollm3", _LLAMA, rotates_some_layers=True, window_is_asked_for=True, rope_base=2_000_000.0),
    "qwen2": Family("qwen2", _LLAMA, window_is_asked_for=True),
    "qwen3": Family("qwen3", _LLAMA | _QUERY_KEY_NORMS, window_is_asked_for=True),
    "gemma2": Family(
        "gemma2",
        _ATTENTION | _DENSE | _FOUR_NORMS,
        _GEMMA_ACTIVATIONS,
        norm_offset=1.0,
        full_attention_every=2,
        needed=_GEMMA2_NEEDS,
    ),
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "phi3": Family(
        "phi3",
        _TWO_NORMS
        | {"self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output"}
        | {"mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down"},
    ),
    "olmo2": Family("olmo2", _OLMO2),
    "olmo3": Family("olmo2", _OLMO2, full_attention_every=4),
    "granite": Family("granite", _LLAMA),
    "mixtral": Family(
        "llama",
        _ATTENTION
        | _TWO_NORMS
        | {"block_sparse_moe.gate": "ffn_gate_inp"}
        | _numbered("block_sparse_moe", _MIXTRAL_EXPERTS)
        | _switched("block_sparse_moe"),
        rope_base=1_000_000.0,
    ),
    "qwen3_moe": Family(
        "qwen3moe",
        _ATTENTION
        | _TWO_NORMS
        | _QUERY_KEY_NORMS
        | {"mlp.gate": "ffn_gate_inp"}
        | _numbered("mlp", _EXPERTS)
        | _switched("mlp"),
        window_is_asked_for=True,
        experts_norm="norm_topk_prob",
    ),
    "gpt_oss": Family(
        "gpt-oss",
        _ATTENTION
        | {
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "post_attention_norm",
            "self_attn.sinks": "attn_sinks",
            "mlp.router": "ffn_gate_inp",
            "mlp.experts.gate_up_proj": "ffn_gate_exps/ffn_up_exps",  # rows of the two alternate
        }
        | {f"mlp.experts.{name}": to for name, to in _EXPERTS.items()},
        full_attention_every=2,
        rope_base=150_000.0,
    ),
}
