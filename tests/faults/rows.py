"""What was measured of one fault, for people and for programs."""

import json
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any


@dataclass
class Row:
    """All rounds of one fault. `told`: what went wrong, a line each; `held_mib`: by all our processes together after
    each round.
    """

    fault: str
    rounds: int = 0
    streams: int = 0
    completed: int = 0
    errors: list[str] = field(default_factory=list)  # with a reason
    wrong: int = 0  # or ended as if they were whole
    hung: int = 0
    orphans: int = 0
    leaked: int = 0  # slots, files, processes, file descriptors
    near: int = 0  # tokens that are best only nearly, where we can't know how the cache was filled
    gaps_s: list[float] = field(default_factory=list)  # each stream's longest wait for a token after the fault
    held_mib: list[float] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    @property
    def grown_mib(self) -> float:
        """From the first round to the last."""
        return self.held_mib[-1] - self.held_mib[0] if self.held_mib else 0.0

    def cells(self) -> list[str]:
        gaps = self.gaps_s or [0.0]
        counts = [self.rounds, self.streams, self.completed, len(self.errors), self.wrong, self.hung, self.orphans]
        figures = f"{median(gaps):.1f}", f"{max(gaps):.1f}"
        return [self.fault, *map(str, [*counts, self.leaked]), *figures, f"{self.grown_mib:+.0f}"]

    def summary(self) -> dict[str, Any]:
        gaps = self.gaps_s or [0.0]
        figures = {"gap_median_s": median(gaps), "gap_worst_s": max(gaps), "grown_mib": self.grown_mib}
        return asdict(self) | figures


HEADER = (
    "fault",
    "rounds",
    "streams",
    "completed",
    "errors with reason",
    "wrong",
    "hung",
    "orphans",
    "leaked",
    "gap median s",
    "gap worst s",
    "memory MiB",
)


def table(rows: list[Row]) -> str:
    """In Markdown, as `docs/reliability.md` has it."""
    lines = [list(HEADER), ["---"] * len(HEADER), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def written(rows: list[Row]) -> str:
    return json.dumps([row.summary() for row in rows], indent=2) + "\n"
