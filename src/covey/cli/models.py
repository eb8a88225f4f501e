"""`covey models`: those that can be named; and what a file or folder of this machine holds, which no node is asked."""

from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from covey.cli import tables
from covey.cli.client import DEFAULT_URL, CliError, NodeClient
from covey.cli.console import out
from covey.cli.options import Json, Url, explained, print_json
from covey.schema.model import Quantizing

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
    """Tell what types a model's tensors have, and how they will be held: a GGUF file, or a folder of safetensors."""
    rows = _kinds(Path(path).expanduser(), quantize)
    if as_json:
        print_json(rows)
    else:
        out.print(tables.tensors_table(rows))


def _kinds(path: Path, quantize: Quantizing | None) -> list[dict[str, Any]]:
    """Raises `CliError`."""
    from covey.checkpoints import inspection  # noqa: PLC0415 (the other commands start faster so)
    from covey.checkpoints.checkpoint import CheckpointError, TensorReader  # noqa: PLC0415
    from covey.checkpoints.opening import open_checkpoint  # noqa: PLC0415

    try:
        header = open_checkpoint(path)
        if quantize is None:
            return msgspec.to_builtins(inspection.kinds_of(header))
        with TensorReader(path) as reader:
            return msgspec.to_builtins(inspection.quantized_kinds(header, reader, quantize))
    except CheckpointError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise CliError(f"{path} can't be used: {reason}.") from None
    except OSError as error:
        raise CliError(f"{path} can't be read: {error.strerror or error}.") from None
