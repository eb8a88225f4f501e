"""Finds grammars in Lark's notation that only endless text would follow: a rule that has to contain itself again. Pure.

As with schemas, masks can't show it. It is asked of a grammar that the library has compiled, so all that is read here
is what needs what: rules by their names, and groups as rules without one. A rule ends if in one of its alternatives all
that is needed ends. Terminals always do, since the library refuses those that contain themselves. What is not
understood here (a grammar within a grammar) is taken for one that ends: nothing is refused that could be followed.
"""

import json
import re
from collections.abc import Set
from typing import Final

from covey.engine.endless import closed, is_endless

TOKEN: Final = re.compile(
    r"""
    (?P<skip> [ \t\r]+ | (?:\#|//)[^\n]* )
    | (?P<newline> \n )
    | (?P<json> %(?:json|regex|llguidance) [ \t]* )
    | (?P<statement> %(?:ignore|import) )
    | (?P<alias> ->[ \t]*[!?_a-zA-Z][-\w]* )
    | (?P<name> !?[_?]?[a-z][-_a-z0-9]* )
    | (?P<terminal> _?[A-Z][-_A-Z0-9]* | "(?:\\.|[^"\\])*"i? | /(?:\\.|[^/\\])+/[imslux]* | <[^<>\s]+> )
    | (?P<times> (?:~(?=[ \t]*\d)|\{) [ \t]*(?P<least>\d*)[ \t]* (?:(?:\.\.|,)[ \t]*\d*[ \t]*)? \}? )
    | (?P<optional> [?*] )
    | (?P<open> [(\[] )
    | (?P<close> [)\]] )
    | (?P<or> \| )
    | (?P<colon> :(?!:) )
    | (?P<other> \.\. | [-+.,=&~] | \d+ )
    """,
    re.VERBOSE,
)
ENDING: Final = ""  # a need that is met
ENDLESS: Final = "%json"  # one that never is
START: Final = "start"

Rules = dict[str, list[list[str]]]  # of each name the alternatives, and of each of these what it needs


def endless_rules(text: str) -> list[str]:
    """The names of rules that contain one another, the last one the first, for ever; empty if an answer can end."""
    try:
        rules = _Reading(text).rules
    except _UnclearError:
        return []
    needed = {name: {each for needs in ways for each in needs} for name, ways in rules.items()}
    ending = closed(needed, lambda name, ending: any(_is_met(needs, rules, ending) for needs in rules[name]))
    return _circle(rules, ending) if START in rules and START not in ending else []


def _is_met(needs: list[str], rules: Rules, ending: Set[str]) -> bool:
    return all(each in ending or each not in rules for each in needs)


def _circle(rules: Rules, ending: Set[str]) -> list[str]:
    """Goes from the start on to what does not end either, until it comes by again."""
    way: dict[str, None] = {}
    name = START
    while name not in way:
        way[name] = None
        name = next(each for each in rules[name][0] if not _is_met([each], rules, ending))
    circle = [*way][[*way].index(name) :]
    return [each for each in circle if not each.startswith("(")]


class _UnclearError(Exception):
    """Something in the grammar is not understood here."""


class _Reading:
    """Goes through a grammar once. Raises `_UnclearError`."""

    def __init__(self, text: str) -> None:
        self.rules: Rules = {ENDLESS: [[ENDLESS]]}
        self._text = text
        self._open: list[str] = []  # the rule that is read, and within it the groups
        self._is_head = False  # its colon is still to come
        self._is_line_over = False  # the rule too, unless an alternative follows
        position = 0
        while position < len(text):
            found = TOKEN.match(text, position)
            if not found:
                raise _UnclearError
            position = self._read(found, found.lastgroup or "")

    def _read(self, found: re.Match[str], kind: str) -> int:
        """Returns where to go on."""
        if kind == "newline":
            self._is_line_over = True
        elif kind == "json":
            return self._read_json(found.group().strip(), found.end())
        elif kind != "skip":
            self._leave_rule(kind)
            self._go_on(found, kind)
        return found.end()

    def _leave_rule(self, kind: str) -> None:
        if self._is_line_over and kind != "or":
            if len(self._open) > 1:
                raise _UnclearError
            self._open.clear()
        self._is_line_over = False

    def _go_on(self, found: re.Match[str], kind: str) -> None:
        if self._is_head:
            self._is_head = kind != "colon"
        elif not self._open:
            self._begin(kind, found.group())
        elif kind == "or":
            self.rules[self._open[-1]].append([])
        elif kind == "open":
            self._begin_group()
        elif kind == "close":
            self._end_group(found.group())
        elif kind in ("name", "terminal"):
            self._needs().append(found.group() if kind == "name" else ENDING)
        elif kind == "optional" or (kind == "times" and not int(found["least"] or 0)):
            self._make_optional()
        elif kind in ("colon", "statement"):
            raise _UnclearError

    def _begin(self, kind: str, said: str) -> None:
        if kind not in ("name", "terminal", "statement"):
            raise _UnclearError
        self._is_head = kind != "statement"
        self._open_rule(said.lstrip("!?"))

    def _open_rule(self, name: str) -> None:
        self._open.append(name)
        self.rules[name] = [[]]

    def _begin_group(self) -> None:
        name = f"({len(self.rules)}"
        self._needs().append(name)
        self._open_rule(name)

    def _end_group(self, bracket: str) -> None:
        self._open.pop()
        if not self._open:
            raise _UnclearError
        if bracket == "]":
            self._make_optional()

    def _make_optional(self) -> None:
        """What was needed last."""
        if not self._needs():
            raise _UnclearError
        self._needs()[-1] = ENDING

    def _needs(self) -> list[str]:
        return self.rules[self._open[-1]][-1]

    def _read_json(self, keyword: str, position: int) -> int:
        """A schema may be endless too; what other words say of a terminal or of the whole is not."""
        try:
            value, end = json.JSONDecoder().raw_decode(self._text, position)
        except (ValueError, RecursionError):
            raise _UnclearError from None
        self._leave_rule(keyword)
        if self._open:
            self._needs().append(ENDLESS if keyword == "%json" and is_endless(value) else ENDING)
        return end
