"""Where output goes: answers and tables to standard output, everything about them to standard error."""

from typing import Final

from rich.console import Console

BYTES_UNITS: Final = ("B", "kB", "MB", "GB", "TB")
UNIT: Final = 1000

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def size(count: float) -> str:
    """Bytes for a person: three digits and a unit."""
    for unit in BYTES_UNITS:
        if count < UNIT or unit == BYTES_UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"  # noqa: PLR2004
        count /= UNIT
    raise AssertionError
