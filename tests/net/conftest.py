"""Every test here has a network of its own."""

from collections.abc import Generator
from pathlib import Path

import pytest
from lab import Lab, lab, missing
from up import Nodes

WHY_NOT = missing()
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if WHY_NOT and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=WHY_NOT))


@pytest.fixture
def net(tmp_path: Path) -> Generator[Lab]:
    with lab(tmp_path) as made:
        yield made


@pytest.fixture
def nodes(net: Lab, tmp_path: Path) -> Generator[Nodes]:
    started = Nodes(tmp_path)
    try:
        yield started
    finally:
        started.end()
