"""Renders Jinja templates that come with model files, and so from strangers.

Jinja's sandbox keeps them from reaching into Python. What it does not bound is work and memory. Here each loop turn,
call and look-up is counted, no text or list may grow beyond a limit, and what makes much out of little is left out or
checked first. A hostile template can cost a second, not the node.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Final

from jinja2 import Template, nodes, pass_context, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import do_indent, do_join
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

STEPS_MAX: Final = 2_000_000  # a long chat takes some thousands
LENGTH_MAX: Final = 16 * 1024 * 1024  # of a text or list, and of all output; a prompt of 1 M tokens has about 4 M
NUMBER_MAX: Final = 1 << 128
INDENT_MAX: Final = 64
TEMPLATE_CHARACTERS_MAX: Final = 1024 * 1024  # the longest known are under 30,000
TEMPLATES_CACHED: Final = 32

_REFUSED_METHODS: Final = frozenset({"center", "expandtabs", "format_map", "ljust", "rjust", "translate", "zfill"})
_REFUSED_FILTERS: Final = (
    "batch", "center", "filesizeformat", "format", "pprint", "random", "slice", "urlize", "wordwrap", "xmlattr",
)  # fmt: skip
_WIDE_FORMAT: Final = re.compile(r":[^{}]*(?:\d{4}|\{)|%[^%a-zA-Z]*(?:\d{4}|\*)")  # pads to over 999 characters


class _Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self.steps = STEPS_MAX
        self.characters = LENGTH_MAX

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise SecurityError("it takes too many steps")

    def emit(self, length: int) -> None:
        self.characters -= length
        if self.characters < 0:
            raise SecurityError("its text grows too long")


_budget: ContextVar[_Budget] = ContextVar("budget")


def render_template(source: str, variables: Mapping[str, Any]) -> str:
    """Raises what templates raise: `jinja2.TemplateError` (`SecurityError` beyond a bound), or as Python would."""
    if len(source) > TEMPLATE_CHARACTERS_MAX:
        raise SecurityError(f"it is longer than {TEMPLATE_CHARACTERS_MAX} characters")
    token = _budget.set(_Budget())
    try:
        return _compiled(source).render(variables)
    finally:
        _budget.reset(token)


@lru_cache(maxsize=TEMPLATES_CACHED)
def _compiled(source: str) -> Template:
    return _Environment().from_string(source)


class _Generation(Extension):
    """`{% generation %}` marks for training what the assistant said; here it shows what it holds."""

    tags = frozenset({"generation"})  # pyright: ignore[reportAssignmentType]  # any set serves

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """Set up as Hugging Face's chat templates expect (trimmed blocks, `break` and `continue`), with bounds."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
        del self.globals["lipsum"]
        for name in _REFUSED_FILTERS:
            del self.filters[name]
        self.filters |= {"replace": _replaced, "indent": _indented, "join": _joined, "tojson": _as_json}
        self.filters |= {_COUNTED: _counted, _EMITTED: _emitted, _CONCATENATED: _concatenated}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Lets every loop, output and `~` go through the functions below that count."""
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = _through(_COUNTED, loop.iter)  # pyright: ignore[reportArgumentType]  # declared too wide
        for concat in tree.find_all(nodes.Concat):
            concat.nodes = [_through(_CONCATENATED, nodes.List(concat.nodes))]
        for output in tree.find_all(nodes.Output):
            output.nodes = [_through(_EMITTED, _expression(node)) for node in output.nodes]
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        _budget.get().step()
        return not (isinstance(obj, str) and attr in _REFUSED_METHODS) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and _WIDE_FORMAT.search(value.__self__):
            raise SecurityError("it pads a text beyond 999 characters")
        return wrapped

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  # as in Jinja, so that any keyword is free
        _budget.get().step()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name == "replace":
            _expect_short_replace(owner, *args[:2])
        elif isinstance(owner, str) and name == "join":
            args = tuple(_short_items(each, owner) for each in args)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _budget.get().step()
        _expect_short_result(operator, left, right)
        return super().call_binop(context, operator, left, right)


# ---- what loops, outputs and ~ are led through; a template can't write these names itself ----

_COUNTED: Final = " counted"
_EMITTED: Final = " emitted"
_CONCATENATED: Final = " concatenated"


def _through(name: str, expression: nodes.Expr) -> nodes.Expr:
    return nodes.Filter(expression, name, [], [], None, None, lineno=expression.lineno)


def _expression(node: nodes.Expr) -> nodes.Expr:
    """Text of the template itself is no value that a filter takes."""
    return nodes.Const(node.data, lineno=node.lineno) if isinstance(node, nodes.TemplateData) else node


@pass_context  # so that Jinja does not evaluate it once and for all while it compiles; so below
def _counted(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    del context
    for item in items:
        _budget.get().step()
        yield item


@pass_context
def _emitted(context: Context, value: Any) -> Any:
    del context
    text = str(value)
    _budget.get().emit(len(text))
    return text


@pass_context
def _concatenated(context: Context, items: list[Any]) -> str:
    del context
    return "".join(_short_items(map(str, items), ""))


# ---- what can make much out of little ----


def _replaced(text: Any, old: str, new: str, count: int = -1) -> str:
    _expect_short_replace(str(text), old, new)
    return str(text).replace(old, new, count)


@pass_eval_context
def _joined(context: EvalContext, items: Iterable[Any], separator: str = "", attribute: str | None = None) -> Any:
    return do_join(context, _short_items(items, separator), separator, attribute)


def _indented(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:  # noqa: FBT001, FBT002  # Jinja's own
    if (width if isinstance(width, int) else len(width)) > INDENT_MAX:
        raise SecurityError(f"it indents by over {INDENT_MAX}")
    return do_indent(text, width, first, blank)


def _as_json(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002  # Hugging Face's order
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    if (indent or 0) > INDENT_MAX:
        raise SecurityError(f"it indents by over {INDENT_MAX}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _short_items(items: Iterable[Any], separator: str) -> list[Any]:
    """The items, if they are short enough to be joined."""
    kept: list[Any] = []
    length = 0
    for item in items:
        _budget.get().step()
        length += len(separator) + (len(item) if isinstance(item, str) else 1)
        _expect_short(length)
        kept.append(item)
    return kept


def _expect_short_replace(text: str, old: Any = "", new: Any = "") -> None:
    if isinstance(old, str) and isinstance(new, str):
        _expect_short(len(text) + text.count(old) * len(new))


def _expect_short_result(operator: str, left: Any, right: Any) -> None:
    if operator == "+":
        _expect_short(_length(left) + _length(right))
    elif operator == "*" and _length(left) + _length(right):
        _expect_short(max(_length(left), 1) * max(_length(right), 1) * max(_number(left), _number(right), 1))
    elif operator in {"*", "**"} and max(_number(left), 2) ** min(_number(right), 128) > NUMBER_MAX:
        raise SecurityError("it calculates with numbers that are too large")
    elif operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
        raise SecurityError("it pads a text beyond 999 characters")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _number(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 0


def _expect_short(length: int) -> None:
    if length > LENGTH_MAX:
        raise SecurityError("its text grows too long")
