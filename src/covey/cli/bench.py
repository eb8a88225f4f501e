"""The command `covey bench`, and what it refuses of its options. What it does is in `benching`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import typer

from covey.cli.client import DEFAULT_URL, NodeClient
from covey.cli.options import Url, explained

CONCURRENCY_MAX: Final = 256
PROMPT_TOKENS: Final = 512
NEW_TOKENS: Final = 128

HELP: Final = """Measure how fast a model answers, over HTTP. Ctrl-C ends it, and shows what was measured so far.

Each figure is of a round, which is so many requests at once:

- prefill: tokens of prompts, without what a prefix cache held, by the time
  from sending until the last answer begins
- decode: tokens of answers, all but each one's first, of all requests
  together, by the time from the first piece of text to the last
- total: tokens of whole prompts and of answers, of all requests together,
  by the time of the round
- first token: from sending to the first piece of text; the median request's
- each token: between two pieces of text of one answer, which are mostly
  tokens; 95 % took no longer than p95
- memory: what the model's runners hold on all nodes, as these reported last;
  `covey ps` tells what is set aside for them, full caches included
"""


class Against(StrEnum):
    LLAMA_CPP = "llama.cpp"


@explained
def bench(
    model: Annotated[
        str | None, typer.Argument(help="A model that is placed, or an instance; without one: the one that is ready.")
    ] = None,
    prompt_tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, help=f"Tokens of a prompt; again, for several sizes; default: {PROMPT_TOKENS}."),
    ] = None,
    new_tokens: Annotated[
        list[int] | None, typer.Option(min=1, help=f"Tokens of an answer; again, for several; default: {NEW_TOKENS}.")
    ] = None,
    concurrency: Annotated[
        list[int] | None,
        typer.Option(min=1, max=CONCURRENCY_MAX, help="Requests at once; again, for several; default: 1."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of each case, whose median is shown.")] = 5,
    warm_up: Annotated[int, typer.Option(min=0, help="Rounds of each case before those, which do not count.")] = 1,
    shared_prefix: Annotated[
        int, typer.Option(min=0, help="So many tokens of all prompts are the same, for the prefix cache.")
    ] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything into this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures into this file, which ends with .svg.")] = None,
    against: Annotated[Against | None, typer.Option(help="The same file in another server, in turn.")] = None,
    llama_server: Annotated[Path | None, typer.Option(help="The program; default: the one on the PATH.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of llama-server; default: as our runners have.")] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Measures, and shows what came of it."""
    from covey.cli.benching.figures import Case  # noqa: PLC0415 (the other commands start faster so; so do the next)
    from covey.cli.benching.measuring import Plan  # noqa: PLC0415
    from covey.cli.benching.running import Asked, Rival, run  # noqa: PLC0415
    from covey.cli.demo import ends_by_signal  # noqa: PLC0415

    if against is None and (llama_server or threads):
        raise typer.BadParameter("--llama-server and --threads belong to --against llama.cpp.")
    check_files(json_file, plot)
    cases = {
        Case(prompt, new, at_once): None
        for at_once in concurrency or [1]
        for prompt in prompt_tokens or [PROMPT_TOKENS]
        for new in new_tokens or [NEW_TOKENS]
    }
    asked = Asked(
        model=model,
        plan=Plan(tuple(cases), repeats, warm_up),
        shared_tokens=shared_prefix,
        json_file=json_file,
        plot_file=plot,
        rival=Rival(llama_server, threads) if against else None,
    )
    with ends_by_signal(), NodeClient(url) as node:
        run(node, asked)


def check_files(json_file: Path | None, plot: Path | None) -> None:
    """Before minutes are spent on what can't be written. Raises `typer.BadParameter`."""
    if plot is not None and plot.suffix != ".svg":
        raise typer.BadParameter(f"--plot draws SVG: name a file that ends with .svg, which {plot} does not.")
    for path in filter(None, (json_file, plot)):
        if not path.absolute().parent.is_dir():
            raise typer.BadParameter(f"There is no folder {path.absolute().parent} for {path.name}: make it first.")
        if path.is_dir():
            raise typer.BadParameter(f"{path} is a folder: name a file.")
