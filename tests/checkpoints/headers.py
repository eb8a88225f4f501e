"""Makes headers of GGUF files that exist nowhere."""

from typing import Any

from covey.checkpoints.checkpoint import Checkpoint, TensorEntry


def tensor(name: str, byte_count: int, *, kind: str = "Q4_1", shape: tuple[int, ...] = (8, 8)) -> TensorEntry:
    return TensorEntry(name, kind, shape, 0, byte_count)


def llama_header(*, tied: bool = True, without: str = "", **changed: Any) -> Checkpoint:
    """Three layers of 1000 bytes in the file; `changed` metadata is written `llama__block_count`."""
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.block_count": 3,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.context_length": 2048,
        "llama.vocab_size": 100,
    }
    metadata |= {key.replace("__", "."): value for key, value in changed.items()}
    tensors = [
        tensor("token_embd.weight", 700, kind="Q8_0", shape=(100, 64)),
        *(tensor(f"blk.{layer}.attn_q.weight", 900) for layer in range(3)),
        *(tensor(f"blk.{layer}.attn_norm.weight", 100, kind="F32") for layer in range(3)),
        tensor("output_norm.weight", 50, kind="F32"),
        tensor("rope_freqs.weight", 7, kind="F32"),
        *([] if tied else [tensor("output.weight", 800)]),
    ]
    return Checkpoint(
        metadata={key: value for key, value in metadata.items() if key != without},
        tensors={each.name: each for each in tensors if each.name != without},
        file_bytes=4557 if tied else 5357,
    )
