"""What a check found."""

from collections.abc import Iterable, Sequence
from enum import StrEnum

from msgspec import Struct


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"  # it may be meant so, or get in the way later
    PROBLEM = "problem"  # what people want of Covey can't work so


class Finding(Struct, frozen=True, kw_only=True):
    """`seen` and `advice` are sentences; there is none to give where all is well."""

    check: str
    level: Level
    seen: str
    advice: str = ""


def ok(check: str, seen: str) -> Finding:
    return Finding(check=check, level=Level.OK, seen=seen)


def warning(check: str, seen: str, advice: str) -> Finding:
    return Finding(check=check, level=Level.WARNING, seen=seen, advice=advice)


def problem(check: str, seen: str, advice: str) -> Finding:
    return Finding(check=check, level=Level.PROBLEM, seen=seen, advice=advice)


def summary(findings: Iterable[Finding]) -> str:
    """One line: what is wrong, by the names of the checks."""
    found = list(findings)
    parts = [_part(level, [each.check for each in found if each.level is level]) for level in _BAD]
    return " ".join(part for part in parts if part) or "Nothing is wrong, as far as can be seen from here."


_BAD = (Level.PROBLEM, Level.WARNING)


def _part(level: Level, checks: Sequence[str]) -> str:
    if not checks:
        return ""
    return f"{len(checks)} {level}{'s' * (len(checks) > 1)}: {', '.join(dict.fromkeys(checks))}."
