"""What was measured, as a table for people and as plain data for `--json`."""

from collections.abc import Sequence
from importlib import metadata
from typing import Any, Final

import msgspec
from msgspec import Struct

from covey.cli.benching.cluster import Chosen
from covey.cli.benching.figures import MEASURES, Case, Ratio, Round, figures, medians, ratios
from covey.cli.benching.measuring import Plan, Results
from covey.cli.listing import Listing
from covey.cli.tables import stage_rows
from covey.schema.cluster import Hardware

NONE: Final = "-"
COMPARED: Final = (
    "Above 1 Covey is the better one, in times and memory, too; in brackets: least and most of the rounds."
)
CACHED_SHARE_TOLD: Final = 0.1  # the model's template begins all prompts alike, which is a few tokens


class Setting(Struct, frozen=True, kw_only=True):
    """What was measured, and on what."""

    model: Chosen
    names: dict[str, str]  # of nodes
    machines: Sequence[Hardware]
    plan: Plan
    seed: int
    shared_tokens: int
    rival_commands: Sequence[Sequence[str]] = ()  # one for each concurrency


def by_server(rounds: Sequence[dict[str, Round]]) -> dict[str, list[Round]]:
    """The same rounds, by who answered."""
    return {name: [each[name] for each in rounds] for name in rounds[0]}


def comparison(rounds: Sequence[dict[str, Round]]) -> dict[str, Ratio | None] | None:
    """None where one server was alone."""
    servers = list(by_server(rounds).values())
    return ratios(*servers) if len(servers) > 1 else None


def table(results: Results) -> Listing:
    """A line for each measure of each case."""
    names = list(next(iter(results.values()))[0])
    compared = ["times as good"] if len(names) > 1 else []
    rows = [row for case, rounds in results.items() for row in _rows(case, rounds)]
    return Listing(titles=("case", "measure", *names, *compared), rows=rows, folded=("measure",))


def _rows(case: Case, rounds: Sequence[dict[str, Round]]) -> list[tuple[str, ...]]:
    found = [medians(measured) for measured in by_server(rounds).values()]
    compared, head = comparison(rounds), str(case)
    rows: list[tuple[str, ...]] = []
    for name, measure in MEASURES.items():
        cells = [number(each[name]) for each in found]
        ratio = [] if compared is None else [_ratio_cell(compared[name])]
        rows.append((head, f"{measure.title}, {measure.unit}", *cells, *ratio))
        head = ""
    return rows


def number(value: float | None) -> str:
    """Three digits, or all before the point."""
    if value is None:
        return NONE
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"  # noqa: PLR2004


def _ratio_cell(ratio: Ratio | None) -> str:
    return NONE if ratio is None else f"{ratio.median:.2f} ({ratio.least:.2f} to {ratio.most:.2f})"


def notes(results: Results, *, is_shared: bool) -> list[str]:
    """What a reader should know of these figures, a sentence each."""
    rounds = [each for measured in results.values() for each in measured]
    samples = [sample for each in rounds for measured in each.values() for sample in measured.samples]
    cached, prompts = sum(each.cached_tokens for each in samples), sum(each.prompt_tokens for each in samples)
    told = [COMPARED] if rounds and len(rounds[0]) > 1 else []
    if cached > CACHED_SHARE_TOLD * prompts and not is_shared:
        told.append(
            f"{cached} of {prompts} tokens of prompts were in a prefix cache, though no two are alike: perhaps what "
            "the model's template begins them with."
        )
    return told


def report(setting: Setting, results: Results) -> dict[str, Any]:
    """Everything, down to the time of each piece of text."""
    card = setting.model.instances[0].card
    return {
        "covey_version": metadata.version("covey"),
        "model_id": card.model_id,
        "quantization": card.quantization,
        "file_bytes": card.file_bytes,
        "machines": [_machine(each) for each in setting.machines],
        "instances": [
            {
                "context_length": each.context_length,
                "slots": each.slot_count,
                "exact": each.exact,
                "nodes": stage_rows(each, setting.names),
            }
            for each in setting.model.instances
        ],
        "against": [list(each) for each in setting.rival_commands],
        "seed": setting.seed,
        "shared_prefix": setting.shared_tokens,
        "warm_ups": setting.plan.warm_ups,
        "repeats": setting.plan.repeats,
        "is_complete": is_complete(setting.plan, results),
        "units": {name: measure.unit for name, measure in MEASURES.items()},
        "cases": [_case_report(case, rounds) for case, rounds in results.items()],
    }


def is_complete(plan: Plan, results: Results) -> bool:
    return all(len(results.get(case, [])) == plan.repeats for case in plan.cases)


def _machine(hardware: Hardware) -> dict[str, Any]:
    return {"processor": hardware.processor, "cores": hardware.physical_cores, "os": hardware.os_name}


def _case_report(case: Case, rounds: Sequence[dict[str, Round]]) -> dict[str, Any]:
    servers = {
        name: {"medians": medians(measured), "rounds": [_round_report(each) for each in measured]}
        for name, measured in by_server(rounds).items()
    }
    return {
        **msgspec.structs.asdict(case),
        "servers": servers,
        "times_as_good": msgspec.to_builtins(comparison(rounds)),
    }


def _round_report(measured: Round) -> dict[str, Any]:
    return {**figures(measured), "seconds": measured.seconds, "samples": msgspec.to_builtins(measured.samples)}
