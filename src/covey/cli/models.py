"""`covey models`: those that can be named; and what a file or folder of this machine holds, which no node is asked."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from covey.checkpoints.ranks import rank_counts
from covey.cli import tables
from covey.cli.client import DEFAULT_URL, CliError, NodeClient
from covey.cli.console import out
from covey.cli.options import Json, Url, explained, print_json
from covey.control.placement.memory import Load, heads_of, weight_bytes
from covey.schema.model import ModelCard, Quantizing, Shard

app = typer.Typer(help="List the models that can be named, or look into one on this machine.")

Quantize = Annotated[
    Quantizing | None, typer.Option(help="Measure what rounding matrices in full precision would cost.")
]


@app.callback(invoke_without_command=True)
@explained
def models(context: typer.Context, url: Url = DEFAULT_URL, as_json: Json = False) -> None:  # noqa: FBT002 (Typer's way to a flag)
    """List the models that can be named."""
    if context.invoked_subcommand is not None:
        return
    with NodeClient(url) as node:
        listed = node.models()
    if as_json:
        print_json(listed)
    else:
        out.print(tables.models_table(listed))


@app.command()
@explained
def inspect(path: str, quantize: Quantize = None, as_json: Json = False) -> None:  # noqa: FBT002
    """Tell what types a model's tensors have, and how they will be held: a GGUF file, or a folder of safetensors. If it
    is no model that can be run, the reason follows, and the exit status is 1.
    """
    place = Path(os.path.expanduser(path))  # noqa: PTH111 - that of pathlib raises for unknown users
    rows = _kinds(place, quantize)
    if as_json:
        print_json(rows)
    else:
        out.print(tables.tensors_table(rows))
    card = _expect_runnable(place)
    if not as_json:
        out.print(f"\n{_summary(card, quantize)}", soft_wrap=True)


def _summary(card: ModelCard, quantize: Quantizing | None) -> str:
    """What one asks before a placement."""
    rounded = next((each for each in card.quantized if each.quantize is quantize), None)
    held = weight_bytes(Load(card, card.context_length_max, 1, quantize))
    counts = rank_counts(card.architecture, heads_of(card), card.feed_forward_size)[1:]
    shared = f"--tensor {' or '.join(map(str, counts))}" if counts else "no --tensor"
    useless = f" There is nothing in full precision that --quantize {quantize} would round."
    return (
        f"{card.architecture}, {card.layer_count} layers ({shared}), context {card.context_length_max}, vocabulary "
        f"{card.vocabulary_size}: {tables.size(card.file_bytes)} in the file, {tables.size(held)} in memory, without "
        f"caches and programs.{useless if quantize and not rounded else ''}"
    )


def _kinds(path: Path, quantize: Quantizing | None) -> list[dict[str, Any]]:
    """Raises `CliError`."""
    from covey.checkpoints import inspection  # noqa: PLC0415 (the other commands start faster so)
    from covey.checkpoints.checkpoint import TensorReader  # noqa: PLC0415
    from covey.checkpoints.opening import open_checkpoint  # noqa: PLC0415

    with _told(path, "can't be used"):
        header = open_checkpoint(path)
        if quantize is None:
            return msgspec.to_builtins(inspection.kinds_of(header))
        with TensorReader(path) as reader:
            return msgspec.to_builtins(inspection.quantized_kinds(header, reader, quantize))


def _expect_runnable(path: Path) -> ModelCard:
    """Raises `CliError` with what a node, or a runner that is to load it, would say."""
    from covey.checkpoints.opening import open_checkpoint  # noqa: PLC0415
    from covey.effects.model_files import runnable_card  # noqa: PLC0415
    from covey.engine.onnx import settings, tensors  # noqa: PLC0415

    with _told(path, "can't be run"):
        header = open_checkpoint(path)
        card = runnable_card(path, header)
        whole = Shard(0, card.layer_count, card.layer_count)
        architecture = settings.read_settings(header)
        needed = tensors.needed(header, architecture, whole, card.context_length_max)
        tensors.check(header, architecture, needed)
        return card


@contextmanager
def _told(path: Path, failure: str) -> Generator[None]:
    """Raises what is wrong with the model as `CliError`."""
    from covey.checkpoints.checkpoint import CheckpointError  # noqa: PLC0415
    from covey.engine.contract import EngineError  # noqa: PLC0415

    try:
        yield
    except (CheckpointError, EngineError) as error:
        reason = str(error).removeprefix(f"{path}: ").removesuffix(".")
        raise CliError(f"{path} {failure}: {reason}.") from None
    except OSError as error:
        raise CliError(f"{path} can't be read: {error.strerror or error}.") from None
