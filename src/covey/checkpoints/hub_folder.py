"""Opens a folder as Hugging Face's libraries and MLX write it: `config.json`, safetensors, `tokenizer.json`.

It becomes what a GGUF file's header becomes. Nothing in it is ever run or unpickled, and no name in it leads out of it.
"""

from pathlib import Path
from typing import Any, Final

import msgspec

from covey.checkpoints.checkpoint import Checkpoint, CheckpointError, TensorEntry
from covey.checkpoints.hub_config import family_of, text_config, translate
from covey.checkpoints.hub_quantization import read_quantization
from covey.checkpoints.hub_tensors import entries_of, given_entry
from covey.checkpoints.safetensors_file import SUFFIX, read_safetensors
from covey.checkpoints.vocabulary import STOP_IDS

CONFIG: Final = "config.json"
INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
TEXT_BYTES_MAX: Final = 256 * 1024 * 1024  # the largest vocabularies take some 35 MB
SHARDS_MAX: Final = 10_000

TOKENIZER: Final = "tokenizer.huggingface.json"  # GGUF's key for the text of a tokenizer.json
TOKENIZER_CONFIG: Final = "covey.tokenizer_config"
TEMPLATE: Final = "tokenizer.chat_template"


def read_folder(path: Path) -> Checkpoint:
    """Reads no more of the weights than their headers. Raises `CheckpointError`, `OSError`."""
    try:
        return _read(path)
    except CheckpointError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise CheckpointError(reason if reason.startswith(str(path)) else f"{path}: {reason}") from None


def shard_names(path: Path) -> list[str]:
    """The files that hold the folder's weights, in order. Raises `CheckpointError`, `OSError`."""
    if (path / INDEX).exists():
        return sorted(set(_index(path).values()))
    if not (path / SINGLE).exists():
        raise CheckpointError(_no_weights(path))
    return [SINGLE]


def _read(path: Path) -> Checkpoint:
    config = text_config(_object(path / CONFIG))
    family = family_of(config)
    quantization = read_quantization(config)
    translated = translate(config, family)
    raw, file_bytes = _tensors(path)
    tensors = entries_of(raw, family, quantization)
    if config.get("tie_word_embeddings") is True:
        tensors.pop("output.weight", None)  # some store the tied one twice
    tensors |= {name: given_entry(name, content) for name, content in translated.tensors.items()}
    return Checkpoint(translated.metadata | _text_metadata(path, config), tensors, file_bytes)


def _tensors(path: Path) -> tuple[dict[str, TensorEntry], int]:
    found: dict[str, TensorEntry] = {}
    file_bytes = 0
    for name in shard_names(path):
        if not (path / name).exists():
            raise CheckpointError(f"its file {name} is missing, which {INDEX} names; fetch it, too")
        tensors, size = read_safetensors(path / name)
        if twice := next((each for each in tensors if each in found), None):
            raise CheckpointError(f"its tensor {twice!r} is in two files: {found[twice].file} and {name}")
        found |= tensors
        file_bytes += size
    _expect_indexed(path, found)
    return found, file_bytes


def _expect_indexed(path: Path, found: dict[str, TensorEntry]) -> None:
    if not (path / INDEX).exists():
        return
    for name, file in _index(path).items():
        if name not in found or found[name].file != file:
            raise CheckpointError(f"its tensor {name!r} is not in {file}, where {INDEX} says that it is")


def _index(path: Path) -> dict[str, str]:
    index: Any = _object(path / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()) or not index:
        raise CheckpointError(f"its {INDEX} has no weight_map that says which file holds which tensor")
    files = set(index.values())
    if len(files) > SHARDS_MAX:
        raise CheckpointError(f"its {INDEX} names {len(files)} files")
    for file in files:
        if Path(file).name != file or not file.endswith(SUFFIX):
            raise CheckpointError(f"its {INDEX} names {file!r}, which is no safetensors file of this folder")
    return index


def _no_weights(path: Path) -> str:
    pickled = sorted(each.name for each in path.iterdir() if each.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickled:
        return (
            f"its weights are in {pickled[0]}, a format that runs code when it is read; take a version in safetensors"
        )
    return f"it has neither {SINGLE} nor {INDEX}"


def _text_metadata(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What belongs to text; a folder without it can be computed, but not talked to."""
    tokenizer_config = _optional_object(path / "tokenizer_config.json")
    found: dict[str, Any] = {TOKENIZER_CONFIG: tokenizer_config, STOP_IDS: _stop_ids(path, config)}
    if (path / "tokenizer.json").exists():
        found[TOKENIZER] = _text(path / "tokenizer.json")
    template = _template(path, tokenizer_config)
    if template:
        found[TEMPLATE] = template
    return found


def _stop_ids(path: Path, config: dict[str, Any]) -> list[int]:
    stated = _optional_object(path / "generation_config.json").get("eos_token_id", config.get("eos_token_id"))
    listed: list[Any] = stated if isinstance(stated, list) else [stated] if stated is not None else []
    if not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in listed):
        raise CheckpointError(f"its 'eos_token_id' is {stated!r}, where tokens' numbers belong")
    return listed


def _template(path: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """In a file of its own, or among the tokenizer's settings, where there may be several by name."""
    if (path / "chat_template.jinja").exists():
        return _text(path / "chat_template.jinja")
    stated: Any = tokenizer_config.get("chat_template")
    if stated is None and (path / "chat_template.json").exists():
        stated = _object(path / "chat_template.json").get("chat_template")
    if isinstance(stated, list):
        named = [each for each in stated if isinstance(each, dict)]
        stated = next((each.get("template") for each in named if each.get("name") == "default"), None)
    if stated is not None and not isinstance(stated, str):
        raise CheckpointError("its chat template is no text")
    return stated


def _optional_object(path: Path) -> dict[str, Any]:
    return _object(path) if path.exists() else {}


def _object(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"it has no {path.name}, so it is no folder of a model in Hugging Face's or MLX's format")
    try:
        found = msgspec.json.decode(_text(path))
    except (msgspec.DecodeError, RecursionError) as error:
        raise CheckpointError(f"its {path.name} is no JSON ({error})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"its {path.name} holds no JSON object")
    return found


def _text(path: Path) -> str:
    if not path.is_file():
        raise CheckpointError(f"its {path.name} is not a regular file")
    if path.stat().st_size > TEXT_BYTES_MAX:
        raise CheckpointError(f"its {path.name} has over {TEXT_BYTES_MAX} bytes")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"its {path.name} is no UTF-8 text") from None
