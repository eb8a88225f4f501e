"""`covey bench`: from what was asked for to what is shown, also where it ends early."""

import json
import secrets
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from msgspec import Struct
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from covey.cli.benching import llama_server
from covey.cli.benching.asking import Server, ask_together
from covey.cli.benching.cluster import Chosen, ClusterSide, chosen, file_here, hardware
from covey.cli.benching.figures import Case
from covey.cli.benching.measuring import Plan, Results, Side, measure
from covey.cli.benching.picture import draw
from covey.cli.benching.prompts import Prompts
from covey.cli.benching.showing import Setting, headings, notes, report, table
from covey.cli.client import CliError, NodeClient
from covey.cli.console import err, out
from covey.cli.tables import node_names
from covey.schema.cluster import ClusterState

SEED_BITS: Final = 32


class Rival(Struct, frozen=True):
    """llama.cpp's server. None: the one on the PATH, and as many threads as the model's runners have."""

    program: Path | None = None
    thread_count: int | None = None


class Asked(Struct, frozen=True, kw_only=True):
    """As `covey bench` was called."""

    model: str | None  # None: the one that is ready
    plan: Plan
    shared_tokens: int = 0
    json_file: Path | None = None
    plot_file: Path | None = None
    rival: Rival | None = None


class Measured(Struct, frozen=True):
    setting: Setting
    results: Results


def run(node: NodeClient, asked: Asked) -> Measured:
    """Shows what was measured, however it ends: to the end, by Ctrl-C, or with a `CliError`."""
    state = node.cluster()
    model = chosen(state, asked.model)
    model.check(asked.plan.cases)
    side = ClusterSide(node, model)
    commands = _rival_commands(state, model, node.url, asked)
    setting = Setting(
        model=model,
        names=node_names(state),
        machines=hardware(state, model),
        plan=asked.plan,
        seed=secrets.randbits(SEED_BITS),
        shared_tokens=asked.shared_tokens,
        rival_commands=list(commands.values()),
    )
    _warn_of_waiting(model, asked.plan)
    prompts = Prompts(setting.seed, partial(_count_tokens, side.server), asked.shared_tokens)
    results: Results = {}
    try:
        with _progress(asked.plan) as told:
            measure(asked.plan, prompts, partial(_sides, side, commands), results, told)
    finally:
        if results:
            _show(Measured(setting, results), asked)
    return Measured(setting, results)


def _count_tokens(server: Server, prompt: str) -> int:
    (sample,) = ask_together(server, [prompt], new_tokens=1)
    return sample.prompt_tokens


def _rival_commands(state: ClusterState, model: Chosen, url: str, asked: Asked) -> dict[int, list[str]]:
    """How llama.cpp's server is started for each concurrency; none if nobody asked for it. Raises `CliError`."""
    if asked.rival is None:
        return {}
    program, file = llama_server.found(asked.rival.program), file_here(state, model, url)
    threads = asked.rival.thread_count or sum(each.physical_cores for each in hardware(state, model))
    if not threads:
        raise CliError("How many threads the model's runners have is not known yet: say it with --threads.")
    groups: dict[int, list[Case]] = {}
    for case in asked.plan.cases:
        groups.setdefault(case.concurrency, []).append(case)
    return {each: llama_server.command(program, file, threads, cases) for each, cases in groups.items()}


@contextmanager
def _sides(ours: ClusterSide, commands: dict[int, list[str]], cases: Sequence[Case]) -> Generator[Sequence[Side]]:
    """Raises `CliError`."""
    if not commands:
        yield [ours]
        return
    with llama_server.running(commands[cases[0].concurrency], ours.server.model_id) as theirs:
        yield [ours, theirs]


def _warn_of_waiting(model: Chosen, plan: Plan) -> None:
    most, slots = max(case.concurrency for case in plan.cases), model.slot_count
    if most > slots:
        counted = f"{slots} slot{'s' * (slots > 1)}"
        sentence = f"{model.model_id} has {counted}, so of {most} requests at once {most - slots} wait"
        err.print(f"{sentence}: `covey place --slots N` makes more.", style="dim", soft_wrap=True, markup=False)


@contextmanager
def _progress(plan: Plan) -> Generator[Callable[[Case], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[case]}"), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("measuring", total=plan.round_count, case="")

        def told(case: Case) -> None:
            progress.update(task, advance=1, case=str(case))

        yield told


def _show(measured: Measured, asked: Asked) -> None:
    """Raises `CliError` where a file can't be written."""
    setting, results = measured.setting, measured.results
    out.print(table(setting.plan, results))
    for sentence in notes(setting.plan, results, is_shared=asked.shared_tokens > 0):
        err.print(sentence, style="dim", soft_wrap=True, markup=False)
    if asked.json_file:
        _write(asked.json_file, json.dumps(report(setting, results), indent=1).encode())
    if asked.plot_file:
        _write(asked.plot_file, draw(headings(setting, results), results))


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise CliError(f"{path} can't be written ({error.strerror}): name another file.") from None
