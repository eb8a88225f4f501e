"""The house keeps its shape: law of imports, sizes, banned calls, and no machine's paths or leftovers."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "covey"
FILES = sorted(SOURCE.rglob("*.py"))

LEVEL = {
    "schema": 0,
    "checkpoints": 1,
    "text": 1,
    "control": 2,
    "engine": 2,
    "api": 2,
    "serving": 3,
    "effects": 4,
    "node": 5,
    "desktop": 5,
    "cli": 6,
}
FUNCTION_LINES_MAX = 60
FUNCTION_LINES_P90 = 25
FILE_LINES_MAX = 500
BANNED_IN_CONTROL = {
    "anyio", "asyncio", "datetime", "http", "httpx", "onnxruntime", "os", "pathlib", "psutil", "random", "secrets",
    "socket", "subprocess", "tempfile", "threading", "time", "uuid", "zenoh",
}  # fmt: skip
BANNED_CALLS = {"eval", "exec", "open", "input", "hash", "id", "print"}  # in control: a world, or an order of its own
BANNED_ANYWHERE = {"pickle", "shelve", "marshal", "dill"}  # weights and state are data


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in FILES}


def law_breaches(home: str, names: Iterator[str]) -> list[str]:
    """The imports in `names` that a file of room `home` must not have."""
    wrong: list[str] = []
    for name in names:
        parts = name.split(".")
        if parts[0] != "covey" or len(parts) < 2 or parts[1] not in LEVEL or parts[1] == home:
            continue
        if LEVEL[parts[1]] >= LEVEL[home]:
            wrong.append(name)
    return wrong


def test_every_room_has_a_level() -> None:
    rooms = {room(path) for path in FILES} - {"__init__", "__main__"}
    assert rooms <= set(LEVEL)


def test_law_of_imports(trees: dict[Path, ast.Module]) -> None:
    for path, tree in trees.items():
        if room(path) in LEVEL:
            assert law_breaches(room(path), imports(tree)) == [], path


def test_the_law_can_fail() -> None:
    assert law_breaches("control", iter(["covey.engine.link"])) == ["covey.engine.link"]
    assert law_breaches("schema", iter(["covey.text"])) == ["covey.text"]
    assert law_breaches("desktop", iter(["covey.node", "covey.effects.paths"])) == ["covey.node"]
    assert law_breaches("serving", iter(["covey.control.routing", "msgspec"])) == []


def test_no_import_cycles(trees: dict[Path, ast.Module]) -> None:
    names = {"covey." + ".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in FILES}
    edges = {name: {n for n in imports(trees[path]) if n in names and n != name} for name, path in names.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for target in sorted(edges[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in names:
        visit(name, ())


def test_sizes(trees: dict[Path, ast.Module]) -> None:
    lengths: list[int] = []
    for path, tree in trees.items():
        assert len(path.read_text().splitlines()) <= FILE_LINES_MAX, path
        for function in functions(tree):
            assert length(function) <= FUNCTION_LINES_MAX, f"{path}:{function.lineno} {function.name}"
            lengths.append(length(function))
    assert sorted(lengths)[int(len(lengths) * 0.9)] <= FUNCTION_LINES_P90


def test_control_is_pure(trees: dict[Path, ast.Module]) -> None:
    for path, tree in trees.items():
        if room(path) not in {"control", "schema"}:
            continue
        assert not {name.split(".")[0] for name in imports(tree)} & BANNED_IN_CONTROL, path
        for node in ast.walk(tree):
            assert not isinstance(node, ast.AsyncFunctionDef | ast.Await), f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in BANNED_CALLS, f"{path}:{node.lineno} {node.func.id}"


def test_nothing_unpickles(trees: dict[Path, ast.Module]) -> None:
    for path, tree in trees.items():
        assert not {name.split(".")[0] for name in imports(tree)} & BANNED_ANYWHERE, path


def test_every_module_says_what_lives_there(trees: dict[Path, ast.Module]) -> None:
    for path, tree in trees.items():
        assert ast.get_docstring(tree), path


def tracked_texts() -> Iterator[tuple[str, str]]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and path.suffix in {".py", ".md", ".toml", ".txt", ".json", ".sh", ".yml", ""}:
            yield name, path.read_text()


def test_nothing_is_left_over() -> None:
    marks = re.compile(
        "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X", "py" + r"pi\.org", r"files\.python" + "hosted"])
    )
    for name, text in tracked_texts():
        if name != "LICENSE":
            assert not marks.search(text), name


def test_no_two_test_files_share_a_name() -> None:
    """Pytest imports them by their bare names, and would stop before the first test."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
