"""The measurement itself: case by case, round by round, the servers in turn."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from typing import Protocol

from msgspec import Struct

from covey.cli.benching.asking import Server, ask_together
from covey.cli.benching.figures import Case, Round
from covey.cli.benching.prompts import Prompts


class Side(Protocol):
    """One of the servers that are compared."""

    @property
    def server(self) -> Server: ...

    def turn(self) -> AbstractContextManager[object]:
        """While it is asked. The rest of the time it leaves the machine to the other."""
        ...

    def memory_bytes(self) -> int:
        """What the model's processes hold; 0 if that is not known."""
        ...


class Plan(Struct, frozen=True):
    """`warm_ups` rounds of each case come first, and count for nothing."""

    cases: tuple[Case, ...]
    repeats: int
    warm_ups: int

    @property
    def round_count(self) -> int:
        return len(self.cases) * (self.repeats + self.warm_ups)


Results = dict[Case, list[dict[str, Round]]]  # of each round, what each server did
Sides = Callable[[Sequence[Case]], AbstractContextManager[Sequence[Side]]]  # for cases of one concurrency


def measure(plan: Plan, prompts: Prompts, sides: Sides, results: Results, told: Callable[[Case], None]) -> None:
    """Fills `results`, in which every round is whole, however this ends. Raises `CliError`."""
    ordered = sorted(plan.cases, key=lambda case: case.concurrency)
    for _, group in groupby(ordered, key=lambda case: case.concurrency):
        cases = list(group)
        with sides(cases) as running:
            for case in cases:
                for number in range(plan.warm_ups + plan.repeats):
                    told(case)
                    measured = _round(case, prompts, running)
                    if number >= plan.warm_ups:
                        results.setdefault(case, []).append(measured)


def _round(case: Case, prompts: Prompts, sides: Sequence[Side]) -> dict[str, Round]:
    """All servers are asked the same."""
    asked = [prompts.of(case.prompt_tokens) for _ in range(case.concurrency)]
    return {side.server.name: _turn(side, asked, case.new_tokens) for side in sides}


def _turn(side: Side, asked: Sequence[str], new_tokens: int) -> Round:
    with side.turn():
        samples = ask_together(side.server, asked, new_tokens)
        return Round(samples, side.memory_bytes())
