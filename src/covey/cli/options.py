"""What commands have in common: options, and how a failure ends them."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Annotated, Any, Final, ParamSpec

import typer
from rich.markup import escape

from covey.cli import chat
from covey.cli.client import CliError
from covey.cli.console import err
from covey.cli.naming import with_short_ids

FAILURE_EXIT: Final = 1

Url = Annotated[str, typer.Option("--url", envvar="COVEY_URL", help="The node to talk to.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Arguments = ParamSpec("Arguments")


def explained(command: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """A failure is one sentence on standard error and exit status 1."""

    @wraps(command)
    def run(*arguments: Arguments.args, **options: Arguments.kwargs) -> None:
        try:
            command(*arguments, **options)
        except CliError as error:
            err.print(escape(with_short_ids(str(error))), style="red", soft_wrap=True)
            raise typer.Exit(FAILURE_EXIT) from None
        except KeyboardInterrupt:
            raise typer.Exit(chat.INTERRUPTED_EXIT) from None
        except BrokenPipeError:  # the reader of our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(FAILURE_EXIT) from None

    return run


def refuse_contradictions(given: Mapping[str, Any]) -> None:
    """Of the options of `covey up`, by the names of its parameters. Raises `typer.BadParameter`."""
    if given["no_auth"] and given["require_key"]:
        raise typer.BadParameter("--no-auth and --require-key exclude each other.")
    if given["anyone_joins"] and given["join"] is not None:
        raise typer.BadParameter("--open and --join exclude each other: an open cluster has no join code.")


def refuse_url(context: typer.Context) -> None:
    """Where --host or --port say already where the node is; they stand above the environment. Raises
    `typer.BadParameter`.
    """
    source = context.get_parameter_source("url")
    if source is not None and source.name == "COMMANDLINE":
        raise typer.BadParameter("--url excludes --host and --port: all of them say where the node is.")


def print_json(value: Any) -> None:
    chat.write(json.dumps(value, indent=2) + "\n")
