"""Rows under titles: on a terminal as wide as it is, through a pipe whole, and a line for each row."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Final

from msgspec import Struct
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from covey.cli.console import harmless

GAP: Final = 2  # columns of a terminal between two of ours
FOLDED_LEAST: Final = 9  # columns; what is folded into fewer can't be read


class Listing(Struct, frozen=True, kw_only=True):
    """`folded` takes more lines where it is narrow, and `spared` is left out there, the first of it first."""

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: Sequence[str] = ()
    spared: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        cells = [[harmless(cell) for cell in row] for row in self.rows]  # whoever wrote it
        if console.is_terminal:
            yield self._fitted(cells, options.max_width)
        else:
            yield Text("\n".join(self._lines(cells)), no_wrap=True, overflow="ignore")

    def _fitted(self, cells: list[list[str]], width: int) -> Table:
        """Without a frame. Where even what is left is too wide, all of it is folded."""
        kept, natural = list(self.titles), self._widths(cells)
        least = {each: min(natural[each], FOLDED_LEAST) if each in self.folded else natural[each] for each in kept}
        for title in self.spared:
            if _total(least[each] for each in kept) > width:
                kept.remove(title)
        folded = self.folded if _total(least[each] for each in kept) <= width else kept
        drawn = Table(box=None, header_style="bold", pad_edge=False, padding=(0, GAP, 0, 0))
        for title in kept:
            drawn.add_column(title, no_wrap=title not in folded, overflow="fold", min_width=min(least[title], width))
        for row in cells:
            named = dict(zip(self.titles, row, strict=True))
            if any(named[title] for title in kept):  # else it told only what is left out
                drawn.add_row(*(escape(named[title]) for title in kept))
        return drawn

    def _lines(self, cells: list[list[str]]) -> Iterator[str]:
        widths = self._widths(cells).values()
        for row in (list(self.titles), *cells):
            for parts in zip_longest(*(cell.splitlines() for cell in row), fillvalue=""):
                padded = (
                    part + " " * (width + GAP - cell_len(part)) for part, width in zip(parts, widths, strict=True)
                )
                yield "".join(padded).rstrip()

    def _widths(self, cells: list[list[str]]) -> dict[str, int]:
        """The columns that each takes, by title."""
        return {
            title: max(cell_len(line) for cell in (title, *column) for line in cell.splitlines() or [""])
            for title, *column in zip(self.titles, *cells, strict=True)
        }


def _total(widths: Iterator[int]) -> int:
    found = list(widths)
    return sum(found) + GAP * (len(found) - 1)
