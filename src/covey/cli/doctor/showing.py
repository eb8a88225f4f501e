"""What `covey doctor` writes."""

from collections.abc import Sequence
from typing import Any

from msgspec import structs

from covey.cli.doctor.finding import Finding, Level, summary
from covey.cli.listing import Listing


def listing(findings: Sequence[Finding]) -> Listing:
    """A check to a row; what to do about it stands below what was seen."""
    return Listing(
        titles=("check", "is", "what was seen, and what to do"),
        rows=[(each.check, each.level.value, f"{each.seen}\n{each.advice}".strip()) for each in findings],
        folded=("what was seen, and what to do",),
    )


def report(findings: Sequence[Finding]) -> dict[str, Any]:
    """For programs."""
    return {
        "summary": summary(findings),
        "has_problems": has_problems(findings),
        "checks": [structs.asdict(each) for each in findings],
    }


def has_problems(findings: Sequence[Finding]) -> bool:
    return any(each.level is Level.PROBLEM for each in findings)
