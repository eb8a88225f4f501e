"""Fixtures of the tests that touch the world."""

import pytest


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
