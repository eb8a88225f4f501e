"""A node in memory and clients of its API."""

from collections.abc import Callable

import pytest
from fastapi.testclient import TestClient

from covey.api.server import create_app
from tests.api.fake_backend import FakeBackend


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def client_of() -> Callable[[FakeBackend], TestClient]:
    return lambda backend: TestClient(create_app(backend), raise_server_exceptions=False)


@pytest.fixture
def client(backend: FakeBackend, client_of: Callable[[FakeBackend], TestClient]) -> TestClient:
    return client_of(backend)
