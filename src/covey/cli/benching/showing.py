"""What was measured, as a table for people and as plain data for `--json`."""

from collections import Counter
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
from covey.control.activity import enumerated
from covey.schema.cluster import Hardware

NONE: Final = "-"
COMPARED: Final = (
    "Above 1 Covey is the better one, in times and memory, too; in brackets: least and most of the rounds."
)
EXPLAINED: Final = "Medians of the rounds; `covey bench --help` says what each figure is."
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


def table(plan: Plan, results: Results) -> Listing:
    """A line for each measure of each case; one for a case that was not come to."""
    names = list(next(iter(results.values()))[0])
    compared = ["times as good"] if len(names) > 1 else []
    titles = ("case", "measure", *names, *compared)
    rows = [row for case in results for row in _rows(plan, case, results[case])]
    left = [(str(case), _counted([], plan), *[NONE] * (len(titles) - 2)) for case in plan.cases if case not in results]
    return Listing(titles=titles, rows=[*rows, *left], folded=("measure",))


def _rows(plan: Plan, case: Case, rounds: Sequence[dict[str, Round]]) -> list[tuple[str, ...]]:
    """Below the case stands how many rounds it had."""
    found = [medians(measured) for measured in by_server(rounds).values()]
    compared, heads = comparison(rounds), iter((str(case), _counted(rounds, plan)))
    rows: list[tuple[str, ...]] = []
    for name, measure in MEASURES.items():
        cells = [number(each[name]) for each in found]
        ratio = [] if compared is None else [_ratio_cell(compared[name])]
        rows.append((next(heads, ""), f"{measure.title}, {measure.unit}", *cells, *ratio))
    return rows


def _counted(rounds: Sequence[object], plan: Plan) -> str:
    """How many rounds there are, and how many there should be."""
    planned = f"{plan.repeats} round{'s' * (plan.repeats > 1)}"
    return planned if len(rounds) == plan.repeats else f"{len(rounds)} of {planned}"


def missing(plan: Plan, results: Results) -> list[str]:
    """A sentence for each case that has fewer rounds than were asked for."""
    counts = {case: results.get(case, []) for case in plan.cases}
    short = {case: rounds for case, rounds in counts.items() if len(rounds) < plan.repeats}
    return [f"Ended early, with {_counted(rounds, plan)} of {case}." for case, rounds in short.items()]


def number(value: float | None) -> str:
    """Three digits, or all before the point."""
    if value is None:
        return NONE
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"  # noqa: PLR2004


def _ratio_cell(ratio: Ratio | None) -> str:
    return NONE if ratio is None else f"{ratio.median:.2f} ({ratio.least:.2f} to {ratio.most:.2f})"


def notes(plan: Plan, results: Results, *, is_shared: bool) -> list[str]:
    """What a reader should know of these figures, a sentence each."""
    rounds = [each for measured in results.values() for each in measured]
    samples = [sample for each in rounds for measured in each.values() for sample in measured.samples]
    cached, prompts = sum(each.cached_tokens for each in samples), sum(each.prompt_tokens for each in samples)
    told = [*missing(plan, results), EXPLAINED, *([COMPARED] if rounds and len(rounds[0]) > 1 else [])]
    if cached > CACHED_SHARE_TOLD * prompts and not is_shared:
        told.append(
            f"{cached} of {prompts} tokens of prompts were in a prefix cache, though no two are alike: perhaps what "
            "the model's template begins them with. Prefill does not count them."
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
                "quantize": each.quantize,
                "draft": each.draft.model_id if each.draft else None,
                "kv_cache": each.kv_cache,
                "nodes": stage_rows(each, setting.names),
            }
            for each in setting.model.instances
        ],
        "against": [list(each) for each in setting.rival_commands],
        "seed": setting.seed,
        "shared_prefix": setting.shared_tokens,
        "warm_ups": setting.plan.warm_ups,
        "repeats": setting.plan.repeats,
        "is_complete": not missing(setting.plan, results),
        "units": {name: measure.unit for name, measure in MEASURES.items()},
        "cases": [_case_report(case, rounds) for case, rounds in results.items()],
    }


def headings(setting: Setting, results: Results) -> list[str]:
    """What stands above a picture: which model, where, on what machines, and what the bars are."""
    nodes = list({row["name"]: None for each in setting.model.instances for row in stage_rows(each, setting.names)})
    machines = Counter(f"{each.processor}, {each.physical_cores} cores" for each in setting.machines)
    short = missing(setting.plan, results)
    rounds = "the rounds" if short else _counted(results[setting.plan.cases[0]], setting.plan)
    return [
        setting.model.model_id.rpartition("/")[2],
        f"on {enumerated(nodes)}",
        *(f"{count} machine{'s' * (count > 1)}: {machine}" for machine, count in machines.items()),
        f"bars: medians of {rounds}; thin lines: from the least of them to the most",
        *short,
    ]


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
