"""A node of its own for a measurement, which serves one model file and nothing else, and ends with it."""

import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from covey.cli.client import NodeClient
from covey.cli.local_nodes import LocalNode, end_nodes, first_port, start_nodes, wait_together
from covey.cli.placing import Wanted, make_ready


@contextmanager
def serving(model: Path, *, slots: int, context_length: int) -> Generator[NodeClient]:
    """Once the model is ready. Raises `CliError`."""
    nodes: list[LocalNode] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            start_nodes(Path(folder), 1, first_port(0), nodes)
            wait_together(nodes)
            with NodeClient(nodes[0].url) as node:
                make_ready(node, str(model.absolute()), Wanted(slot_count=slots, context_length=context_length))
                yield node
        finally:
            end_nodes(nodes)
