"""What an answer may be, as the llguidance library follows it: compiled within limits, refused with a reason.

Compiling goes as deep as what it is given, and overflows a usual stack: a chain of two thousand references is enough.
So it is done in a thread of its own with a stack that the longest constraint can't fill, one after another: a
grammar that takes long takes one core. Nothing in the library can be told to stop in the middle, so what it is given
is bounded: the longest compilation that was found within these limits takes about a second.
"""

import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache, lru_cache
from queue import SimpleQueue
from typing import Any, Final, TypeVar

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from covey.engine.endless import is_endless
from covey.engine.endless_grammar import ENDLESS, endless_rules
from covey.engine.neutral import without_neutral
from covey.schema.generation import Constraint, ConstraintKind

CHARACTERS_MAX: Final = {ConstraintKind.JSON_SCHEMA: 32_768, ConstraintKind.REGEX: 8_192, ConstraintKind.GRAMMAR: 8_192}
STRING_CHARACTERS_MAX: Final = 8_192  # one string of a schema, which may be a pattern
STACK_BYTES: Final = 256 * 1024 * 1024  # addresses, not memory; a level takes some 6 KB, and has at least 6 characters
LEXER_FUEL: Final = 250_000  # nodes of regular expressions: a quarter of the library's own limit
STEP_FUEL: Final = 100_000  # for one token, for which all streams wait: half of the library's
LEXER_STATES_MAX: Final = 20_000  # of 1 to 2 KB, for as long as the request runs
WHITESPACE: Final = r"[\x20\x0A\x0D\x09]{1,20}"  # between the parts of JSON: small models write on and on if they may
REASON_CHARACTERS_MAX: Final = 300
TOO_DEEP: Final = "it is nested too deep"
COSTLY: Final = ("too many expressions", "precomputation failed", "too big", "too large", "max is", "fuel")
CONTROL_TOKEN: Final = re.compile(r'unknown special token: "(.+?)"; following')
TOKEN_NUMBER: Final = re.compile(r"Token range end too large: (\d+)")
CHECKED_MAX: Final = 64  # programs send the same schema again and again
ONE_OF: Final = "'coerce_one_of'"  # an option of the library, for those who write programs
END: Final = 256  # the token that ends an answer where the tokens are bytes

Result = TypeVar("Result")


class ConstraintError(Exception):
    """A constraint can't be followed. The message is one sentence that names its field."""


class Tokens:
    """A vocabulary in the shape that the library reads. `encode` gives the tokens that the model would write a text
    with; of `special_ids`, which are no text, `tokens` has the names.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self, tokens: list[bytes], special_ids: list[int], stop_ids: list[int], encode: Callable[[str], list[int]]
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = special_ids
        self.stop_ids = stop_ids
        self.eos_token_id = stop_ids[0]
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


class DeepThread:
    """Does one job after another with a large stack. `deep_thread` gives the only one of the process."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._is_started = False

    def submit(self, job: Callable[[], Result]) -> "Future[Result]":
        """What `job` returns or raises; one that is cancelled before its turn is not done."""
        if not self._is_started:
            self._is_started = True
            self._start()
        future: Future[Result] = Future()
        self._jobs.put((future, job))
        return future

    def _start(self) -> None:
        usual = threading.stack_size(STACK_BYTES)  # of all threads that start from now on
        try:
            threading.Thread(target=self._work, name="grammars", daemon=True).start()
        finally:
            threading.stack_size(usual)

    def _work(self) -> None:
        while True:
            future, job = self._jobs.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(job())
            except Exception as error:  # noqa: BLE001 - the top of the thread: whoever waits is told
                future.set_exception(error)
            except BaseException as panic:  # noqa: BLE001 - so the library's language says what is no plain error
                future.set_exception(RuntimeError(str(panic)))


@cache
def deep_thread() -> DeepThread:
    return DeepThread()


def token_tree(tokens: Tokens) -> LLTokenizer:
    """Slow, and holds Python's lock all the while: some 100 ms for 50,000 tokens. Half of it is for the library's
    "slices", sets of tokens that are judged together: without them a mask within a bounded string takes five times as
    long.
    """
    return LLTokenizer(tokens, eos_token=tokens.stop_ids)  # pyright: ignore[reportArgumentType]  # any such shape


def compile_constraint(constraint: Constraint, tree: LLTokenizer) -> LLMatcher:
    """To be called in a `DeepThread`. Raises `ConstraintError`."""
    return _compiled(constraint, _decoded(constraint), tree)


def _decoded(constraint: Constraint) -> Any:
    """The schema, if it is one. Raises `ConstraintError`."""
    if constraint.kind is not ConstraintKind.JSON_SCHEMA:
        return None
    try:
        return msgspec.json.decode(constraint.text)
    except msgspec.DecodeError as error:
        raise refused(constraint, f"it is no JSON: {error}") from None
    except RecursionError:
        raise refused(constraint, TOO_DEEP) from None


def _compiled(constraint: Constraint, schema: Any, tree: LLTokenizer) -> LLMatcher:
    try:
        matcher = LLMatcher(tree, _grammar(constraint, schema), log_level=0, limits=_limits())
    except ValueError as error:
        raise refused(constraint, str(error)) from None
    except RecursionError:
        raise refused(constraint, TOO_DEEP) from None
    check_matcher(constraint, matcher)
    return matcher


def check_matcher(constraint: Constraint, matcher: LLMatcher) -> None:
    """Raises `ConstraintError` if it has failed."""
    if matcher.is_error():
        raise refused(constraint, matcher.get_error())


def check(constraint: Constraint) -> None:
    """To be called in a `DeepThread`. Raises `ConstraintError` for what no model could follow."""
    if reason := _reason_against(constraint):
        raise ConstraintError(reason)


@lru_cache(CHECKED_MAX)
def _reason_against(constraint: Constraint) -> str:
    try:
        _check_size(constraint)
        schema = _decoded(constraint)
        _check_strings(constraint, schema)
        matcher = _compiled(constraint, schema, _byte_tree())
        matcher.compute_bitmask()  # finds that nothing can begin
        check_matcher(constraint, matcher)
        _check_end(constraint, schema)
    except ConstraintError as error:
        return str(error)
    return ""


@cache
def _byte_tree() -> LLTokenizer:
    """Each byte is a token: what can be said of a constraint without any model is found with these."""
    tokens = [*(bytes([byte]) for byte in range(END)), b"< end >"]  # a name with spaces can't be written in a grammar
    return token_tree(Tokens(tokens, [END], [END], lambda text: list(text.encode())))


@cache
def _limits() -> LLParserLimits:
    return LLParserLimits(
        initial_lexer_fuel=LEXER_FUEL,
        step_lexer_fuel=STEP_FUEL,
        max_lexer_states=LEXER_STATES_MAX,
        verbose_errors=False,  # they would print the whole grammar
    )


def _grammar(constraint: Constraint, schema: Any) -> str:
    """In the library's own notation. Raises `ValueError`."""
    match constraint.kind:
        case ConstraintKind.JSON_SCHEMA:
            asked = msgspec.json.encode(without_neutral(schema)).decode()
            return LLMatcher.grammar_from_json_schema(asked, {"whitespace_pattern": WHITESPACE})
        case ConstraintKind.REGEX:
            return LLMatcher.grammar_from_regex(constraint.text)
        case ConstraintKind.GRAMMAR:
            return LLMatcher.grammar_from_lark(constraint.text)


def _check_size(constraint: Constraint) -> None:
    limit = CHARACTERS_MAX[constraint.kind]
    if len(constraint.text) > limit:
        raise refused(constraint, f"it has {len(constraint.text)} characters, and {limit} are the most")


def _check_strings(constraint: Constraint, schema: Any) -> None:
    if _longest_string(schema) > STRING_CHARACTERS_MAX:
        raise refused(constraint, f"a string in it has more than {STRING_CHARACTERS_MAX} characters")


def _check_end(constraint: Constraint, schema: Any) -> None:
    if constraint.kind is ConstraintKind.JSON_SCHEMA and is_endless(schema):
        raise refused(constraint, "nothing satisfies it, since what it requires has to contain itself again, for ever")
    if constraint.kind is ConstraintKind.GRAMMAR and (rules := endless_rules(constraint.text)):
        raise refused(constraint, f"nothing satisfies it, since {_circle(rules)}, for ever; give it an alternative")


def _circle(rules: list[str]) -> str:
    if rules == [ENDLESS]:
        return "what a schema in it requires has to contain itself again"
    others = f" (by way of {', '.join(repr(name) for name in rules[1:])})" if rules[1:] else ""
    return f"the rule {rules[0]!r} has to contain itself again{others}"


def _longest_string(schema: Any) -> int:
    """Keys included."""
    longest, waiting = 0, [schema]
    while waiting:
        match waiting.pop():
            case str() as string:
                longest = max(longest, len(string))
            case list() as items:
                waiting += items
            case dict() as items:
                waiting += [*items, *items.values()]
            case _:
                pass
    return longest


def refused(constraint: Constraint, reason: str) -> ConstraintError:
    return ConstraintError(f"The field '{constraint.field}' can't be followed: {plain(reason)}.")


def plain(reason: str) -> str:
    """The line of the library's reason that says most."""
    lines = reason.strip().splitlines() or [""]
    said = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    said = said.replace("Unimplemented keys:", "these keywords are not supported:")
    said = said.replace("NoExtensionBias", "nothing satisfies it")
    if ONE_OF in said:
        return "more than one choice of a oneOf might fit at once, which is not supported; write anyOf instead"
    if named := CONTROL_TOKEN.search(said):
        return f"it names the control token {named[1]}, and a grammar is of text alone; leave it out"
    if numbered := TOKEN_NUMBER.search(said):
        return f"it names tokens by their numbers, up to {numbered[1]}, and a grammar is of text alone; quote it"
    if any(sign in said for sign in COSTLY):
        return "it is too costly to follow; make it simpler"
    return said[:REASON_CHARACTERS_MAX].rstrip(". ")
