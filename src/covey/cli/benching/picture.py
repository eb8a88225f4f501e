"""What was measured, as bars in one SVG file that needs nothing else: no fonts, no scripts, no drawing library."""

from collections.abc import Sequence
from statistics import median
from textwrap import wrap
from typing import Final
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from msgspec import Struct

from covey.cli.benching.figures import MEASURES, Measure, Round
from covey.cli.benching.measuring import Results
from covey.cli.benching.showing import by_server, number

WIDTH: Final = 760
LABELS: Final = 250  # of that, left of the bars
NUMBERS: Final = 80  # and right of them
MARGIN: Final = 20
LINE: Final = 18
BAR: Final = 12
COLORS: Final = ("#2f7d5b", "#b0763a")  # of the servers, in their order
WHITE, INK, PALE = "#ffffff", "#222222", "#8a8a8a"
FONT: Final = "font: 12px sans-serif"
LINE_CHARACTERS: Final = 105  # that fit above the panels
GAP: Final = 4  # before a word of another style: some programs drop a space where an element begins, firm or not


class Bar(Struct, frozen=True):
    """`label` stands at the first of a case; `values` are those of all rounds, `value` is their median."""

    label: str
    color: str
    value: float
    values: tuple[float, ...]


def draw(headings: Sequence[str], results: Results) -> bytes:
    """A panel for each measure, in it a bar for each case and server, with a line from the least round to the most.

    The first of `headings` is the title.
    """
    panels = [(measure, _bars(results, name)) for name, measure in MEASURES.items()]
    panels = [(measure, bars) for measure, bars in panels if bars]
    servers = list(next(iter(results.values()))[0])
    title, *others = [line for heading in headings for line in wrap(heading, LINE_CHARACTERS)]
    y = MARGIN + LINE * (2 + len(others) + (len(servers) > 1))  # below all that stands above the panels
    height = y + MARGIN + LINE * sum(2 + len(bars) for _, bars in panels)
    picture = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {WIDTH} {height}"})
    picture.set("style", FONT)
    SubElement(picture, "title").text = title
    _box(picture, 0, 0, WIDTH, height, WHITE)
    _text(picture, MARGIN, MARGIN + LINE, title, weight="bold")
    for place, line in enumerate(others, start=2):
        _text(picture, MARGIN, MARGIN + place * LINE, line)
    if len(servers) > 1:
        _legend(picture, servers, y - LINE)
    for measure, bars in panels:
        _panel(picture, y, measure, bars)
        y += LINE * (2 + len(bars))
    indent(picture)
    return tostring(picture, encoding="utf-8", xml_declaration=True)


def _bars(results: Results, name: str) -> list[Bar]:
    bars: list[Bar] = []
    for case, rounds in results.items():
        label = str(case)
        for color, measured in zip(COLORS, by_server(rounds).values(), strict=False):
            values = _values(measured, MEASURES[name])
            if values:
                bars.append(Bar(label, color, median(values), values))
                label = ""
    return bars


def _values(rounds: Sequence[Round], measure: Measure) -> tuple[float, ...]:
    return tuple(sorted(value for each in rounds if (value := measure.of(each)) is not None))


def _panel(picture: Element, y: float, measure: Measure, bars: Sequence[Bar]) -> None:
    better = "more" if measure.more_is_better else "less"
    heading = _text(picture, MARGIN, y + LINE, f"{measure.title}, {measure.unit}", weight="bold")
    pale = {"dx": f"{GAP}", "font-weight": "normal", "fill": PALE}
    SubElement(heading, "tspan", pale).text = f" ({better} is better)"
    most = max(bar.values[-1] for bar in bars)
    scale = (WIDTH - LABELS - NUMBERS - MARGIN) / most
    for place, bar in enumerate(bars, start=2):
        _bar(picture, y + place * LINE, bar, scale)


def _bar(picture: Element, y: float, bar: Bar, scale: float) -> None:
    """`y` is the line that its words stand on."""
    if bar.label:
        _text(picture, MARGIN, y, bar.label)
    _box(picture, LABELS, y - BAR + 2, scale * bar.value, BAR, bar.color)
    ends = {"x1": f"{LABELS + scale * bar.values[0]:.1f}", "x2": f"{LABELS + scale * bar.values[-1]:.1f}"}
    middle = f"{y + 2 - BAR / 2:.1f}"
    SubElement(picture, "line", {**ends, "y1": middle, "y2": middle, "stroke": INK})
    _text(picture, LABELS + scale * bar.values[-1] + 6, y, number(bar.value))


def _legend(picture: Element, servers: Sequence[str], y: float) -> None:
    """`y` is the line that its words stand on."""
    for place, (name, color) in enumerate(zip(servers, COLORS, strict=False)):
        x = LABELS + place * (WIDTH - LABELS) / len(COLORS)
        _box(picture, x, y - BAR + 2, BAR, BAR, color)
        _text(picture, x + BAR + 6, y, name)


def _box(picture: Element, x: float, y: float, width: float, height: float, color: str) -> None:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{width:.1f}", "height": f"{height:.1f}"}
    SubElement(picture, "rect", {**place, "fill": color})


def _text(picture: Element, x: float, y: float, text: str, weight: str = "normal") -> Element:
    written = SubElement(picture, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "fill": INK, "font-weight": weight})
    written.text = text
    return written
