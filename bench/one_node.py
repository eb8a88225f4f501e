"""A node of its own for a measurement, which serves one model file and nothing else, and ends with it."""

import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the harness lives with the tests

from covey.cli.client import NodeClient
from covey.cli.placing import Wanted, make_ready
from tests.nodes import NodeProcess, cluster_name


@contextmanager
def serving(model: Path, *, slots: int, context_length: int, **engine_options: str) -> Generator[NodeClient]:
    """Once the model is ready. Raises `CliError`."""
    with tempfile.TemporaryDirectory() as folder:
        process = NodeProcess(Path(folder), "node", cluster_name(), engine="onnx", **engine_options)
        try:
            process.wait_listening()
            with NodeClient(process.url) as node:
                make_ready(node, str(model.absolute()), Wanted(slot_count=slots, context_length=context_length))
                yield node
        finally:
            process.end()
