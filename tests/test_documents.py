"""What the documents name exists: files, links, make's targets, covey's commands, variables, formats of models."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.routing import APIRoute

from covey.api.server import create_app
from covey.checkpoints.gguf_file import TENSOR_TYPES
from covey.checkpoints.quantization import known_types
from covey.cli.main import app
from covey.schema.cluster import ClusterState, Member, NodeReport
from tests.api.fake_backend import FakeBackend

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINE_CHARACTERS_MAX = 120
GGUF_TYPES = {name for name, _, _ in TENSOR_TYPES.values()}
NOT_OURS = (".venv/", "dist/", "models/")  # made by make, or a folder of the user's data
PATH = re.compile(r"[\w.][\w./-]*/[\w./-]*|[\w-]+\.(?:md|py|toml|txt|svg|json)")


def code_of(text: str) -> Iterator[str]:
    """Code spans and lines of code blocks."""
    fenced = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
    for block in fenced.findall(text):
        yield from block.splitlines()[1:-1]
    for line in fenced.sub("", text).splitlines():
        yield from [line] if line.startswith("    ") else re.findall(r"`([^`]+)`", line)


def links_of(text: str) -> list[str]:
    return [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


def tracked() -> set[str]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(filter(None, listing.stdout.split("\0")))


def exists(name: str, files: set[str]) -> bool:
    """Whether there is a file or folder of that name: from the root, in the package, or anywhere by a bare name."""
    wanted = [f"{place}{name.rstrip('/')}" for place in ("", "src/covey/")]
    if any(f"{path}{suffix}" in files for path in wanted for suffix in ("", ".py")):
        return True
    if any(file.startswith(f"{path}/") for path in wanted for file in files):
        return True
    return "/" not in name and name in {Path(file).name for file in files}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_names_exists(document: Path) -> None:
    text, files = document.read_text(), tracked()
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    commands = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    commands |= {group.name for group in app.registered_groups}
    for link in links_of(text):
        assert (document.parent / link).resolve().relative_to(ROOT).as_posix() in files, link
    for code in code_of(text):
        if PATH.fullmatch(code) and not code.startswith(NOT_OURS):
            assert exists(code, files), code
        for target in re.findall(r"(?:^|\s)make ([a-z]+)", code):
            assert target in targets, code
        for command in re.findall(r"(?:^|\s)covey ([a-z][a-z-]*)", code):
            assert command in commands, code


def test_the_variables_that_documents_name_exist() -> None:
    sources = [*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    known = set(re.findall(r'"(COVEY_[A-Z_]+)"', "".join(path.read_text() for path in sources)))
    named = {name for document in DOCUMENTS for name in re.findall(r"COVEY_[A-Z_]+", document.read_text())}
    assert named <= known


def test_the_changes_name_all_formats() -> None:
    """Whoever reads that their file's format is missing would not try."""
    sentence = re.search(r"in ((?:[A-Z0-9_]+,? (?:or )?)+)", " ".join((ROOT / "CHANGELOG.md").read_text().split()))
    for name in known_types():
        if name not in GGUF_TYPES:
            assert name.split("_")[0] in (ROOT / "CHANGELOG.md").read_text(), name
            continue
        assert re.search(rf"\b{name}\b", sentence.group(1) if sentence else ""), name


def test_the_lines_of_the_changes_fit() -> None:
    assert max(len(line) for line in (ROOT / "CHANGELOG.md").read_text().splitlines()) <= LINE_CHARACTERS_MAX


def test_no_two_decisions_share_a_number() -> None:
    paths = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [path.name[:4] for path in paths] == [f"{number:04}" for number in range(1, len(paths) + 1)]
    for path in paths:
        assert path.read_text().startswith(f"# {path.name[:4]}: "), path.name


def test_the_document_of_the_api_has_every_route_and_every_field_of_the_cluster() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    for route in create_app(FakeBackend()).routes:
        if isinstance(route, APIRoute):
            path = re.escape(route.path.partition("{")[0].rstrip("/"))
            for method in route.methods:
                assert re.search(rf"^\| .*\b{method}\b.*`{path}[`/?].*\|", text, re.MULTILINE), (method, route.path)
    for field in (*ClusterState.__struct_fields__, *Member.__struct_fields__, *NodeReport.__struct_fields__):
        assert f"`{field}`" in text, field


def test_a_document_can_be_wrong() -> None:
    assert list(code_of("a `b/c` d\n\n    make it\n```\ncovey up\n```\n")) == ["covey up", "b/c", "    make it"]
    assert not exists("engine/missing.py", {"src/covey/engine/runner.py"})
    assert exists("engine/runner", {"src/covey/engine/runner.py"})
    assert exists("engine/", {"src/covey/engine/runner.py"})
