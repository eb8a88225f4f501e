"""A node in memory, served on a free port of this machine by a thread."""

import socket
import threading
from collections.abc import Iterator

import pytest
import uvicorn

from covey.api.guard import Access
from covey.api.server import create_guarded_app
from tests.api.fake_backend import FakeBackend
from tests.cli.served_node import ServedNode

STOP_S_MAX = 10


@pytest.fixture
def node() -> Iterator[ServedNode]:
    backend = FakeBackend()
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        create_guarded_app(backend, Access()),
        log_level="warning",
        lifespan="off",
        timeout_graceful_shutdown=1,
        ws="none",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    yield ServedNode(backend, f"http://127.0.0.1:{listener.getsockname()[1]}")
    server.should_exit = True
    thread.join(STOP_S_MAX)
    listener.close()
    assert not thread.is_alive()
