"""A node in memory that listens: what the fixture `node` gives."""

from dataclasses import dataclass

from tests.api.fake_backend import FakeBackend


@dataclass
class ServedNode:
    backend: FakeBackend
    url: str
