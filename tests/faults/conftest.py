"""What all tests of faults share: what the model says undisturbed, and the table of what was measured."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from questions import Questions
from reference import Reference
from rows import Row, table, written

ROWS = pytest.StashKey[list[Row]]()


@pytest.fixture(scope="session")
def questions(demo_model: Path) -> Questions:
    return Questions(Reference(demo_model))


@pytest.fixture
def rows(pytestconfig: pytest.Config) -> Iterator[list[Row]]:
    """What is added here is printed at the end, and after each test written to `$FAULTS_OUT`."""
    found = pytestconfig.stash.setdefault(ROWS, [])
    yield found
    out = os.environ.get("FAULTS_OUT")
    if out:
        Path(out).write_text(written(found))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    found = config.stash.get(ROWS, [])
    if found:
        terminalreporter.section("faults")
        terminalreporter.write_line(table(found))
