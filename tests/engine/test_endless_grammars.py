"""A grammar whose rules contain one another for ever would be answered up to the limit of tokens, never whole."""

import pytest

from covey.engine.endless_grammar import endless_rules
from covey.engine.grammar import ConstraintError, check, deep_thread
from covey.schema.generation import Constraint, ConstraintKind


def checked(text: str) -> None:
    deep_thread().submit(lambda: check(Constraint(ConstraintKind.GRAMMAR, text, "grammar"))).result(60)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('start: "a" start', "since the rule 'start' has to contain itself again, for ever"),
        ('start: "x" a\na: "x" b\nb: "y" ("c" | "d") a', "the rule 'a' has to contain itself again (by way of"),
        ('start: "a" start\n  | "b" start // | "c"\n# | "d"\n', "'start'"),
        ('start: ("a" start)+', "'start'"),
        ('start: ("a" start){1,2} | "b" start~2', "'start'"),
        ('start: "a" (("b" | "c")? ("d" | "e") start)', "'start'"),
        ('%llguidance {}\n%ignore / /\n?start: _x\n!_x: N "b".."d" _x -> named\n%import common.INT -> N', "'_x'"),
        ('start: text start\ntext[capture, stop=":"]: /[^|]*/', "'start'"),
        ('start: %regex {"substring_words": "a b"} start', "'start'"),
        ('start: "a" %json {"type": "array", "items": {"$ref": "#"}, "minItems": 1}', "schema in it"),
    ],
)
def test_what_contains_itself_for_ever(text: str, part: str) -> None:
    with pytest.raises(ConstraintError, match="The field 'grammar' can't be followed: nothing satisfies it") as caught:
        checked(text)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        'start: "a" start | "b"',
        'start: "a" start\n\n  | "b"',
        'start: "a" start |',
        'start: "a" start?',
        'start: "a" ("," start)*',
        'start: "a" ["," start]',
        'start: "a" ("," start)~0..2 start{,3} start{0,1}',
        'start: /a\\/start/ "\\" start" // start\n',
        'start: value\nvalue: "[" [value ("," value)*] "]" | NUMBER\nNUMBER: /[0-9]+/',
        'start: "a" b\nb: "c"\nunused: "d" unused',
        'start: %json {"type": "object", "properties": {"a": {"type": "null"}}}',
        'start: "a" inner\ninner: %lark {\n  start: "b" start | "c"\n}\n',
        'start: count::0x0\ncount::_: "a" count::incr(_) %if lt(_, 3)\n | "b"\n',
        'start: ~"a" | A B\nA: ~/a/ & /b/\nB: "b"',
        "start: <[*]>",
    ],
)
def test_what_can_end(text: str) -> None:
    checked(text)


def test_the_longest_grammars_take_no_time() -> None:
    """Each rule is known only after the next; groups as deep as there is room."""
    chain = "start: r0\n" + "".join(f"r{place}: r{place + 1}\n" for place in range(600))
    assert not endless_rules(chain + 'r600: "a"')
    assert endless_rules(chain + 'r600: "a" r600') == ["r600"]
    assert len(endless_rules(chain + 'r600: "a" r0')) == 601
    assert endless_rules("start: " + "(" * 4000 + "start" + ")" * 4000) == ["start"]
    assert not endless_rules("start: " + "#" * 8000)
