"""Opens whatever a person calls a model: a GGUF file, or a folder as Hugging Face's libraries and MLX write it."""

from pathlib import Path
from typing import Final

from covey.checkpoints.checkpoint import Checkpoint, CheckpointError
from covey.checkpoints.gguf_file import read_header
from covey.checkpoints.hub_folder import read_folder, shard_names
from covey.checkpoints.safetensors_file import SUFFIX

PICKLED: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Raises `CheckpointError`, `OSError`."""
    place = Path(path)
    if place.is_dir():
        return read_folder(place)
    if place.suffix == SUFFIX:
        raise CheckpointError("it is a part of a model; name the folder that holds it and its config.json")
    if place.suffix in PICKLED and place.exists():
        raise CheckpointError(
            "it may be in a format that runs code when it is read; take a version of the model in safetensors or GGUF"
        )
    return read_header(place)


def weight_files(path: str | Path) -> list[Path]:
    """The files whose bytes are the weights. Raises `CheckpointError`, `OSError`."""
    place = Path(path)
    return [place / name for name in shard_names(place)] if place.is_dir() else [place]


def weight_bytes(path: str | Path) -> int:
    """Their size, each opened to see that it can be. Raises `CheckpointError`, `OSError`."""
    total = 0
    for each in weight_files(path):
        with each.open("rb") as file:
            total += file.seek(0, 2)
    return total
