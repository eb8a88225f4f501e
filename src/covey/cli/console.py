"""Where output goes: answers and tables to standard output, everything about them to standard error."""

import sys
import unicodedata
from typing import Final

from rich.console import Console

WIDTH_OF_A_PIPE: Final = 100_000  # columns; whoever reads through a pipe wants lines as they are
KEPT_CONTROLS: Final = frozenset("\n\t")
BYTES_UNITS: Final = ("B", "kB", "MB", "GB", "TB")
UNIT: Final = 1000

out = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_A_PIPE)
err = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else WIDTH_OF_A_PIPE)


def harmless(text: str) -> str:
    """The text as words only: on a terminal, no model moves the cursor or sets the window's title."""
    return "".join(c if c in KEPT_CONTROLS or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


def size(count: float) -> str:
    """Bytes for a person: three digits and a unit."""
    for unit in BYTES_UNITS:
        if count < UNIT or unit == BYTES_UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"  # noqa: PLR2004
        count /= UNIT
    raise AssertionError
