"""Two models on one node that answer at once, against one that answers alone; and against an older version.

    python bench/sharing_cores.py FILE.gguf OTHER.gguf [--against FOLDER] [--rounds 5] [--tokens 192]

Whole nodes, asked over HTTP in turn, nothing guessed: the first model alone, then both at once. `--against`: the source
folder (`src`) of another version of Covey, whose node is asked in turn with this one's.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the harness lives with the tests

from covey.cli.benching.asking import Sample, Server, ask_together
from covey.cli.benching.cluster import ClusterSide, chosen
from covey.cli.client import CliError, NodeClient
from covey.cli.demo import ends_by_signal
from covey.cli.placing import Wanted, make_ready
from tests.nodes import NodeProcess, cluster_name

CONTEXT: Final = 1024
PROMPT: Final = "Write a long story about a lighthouse keeper and the sea."


@contextmanager
def serving(models: Sequence[Path], source: Path | None) -> Generator[list[Server]]:
    """One node with all models. Raises `CliError`."""
    within = ("env", f"PYTHONPATH={source.absolute()}") if source else ()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ends:
        node = NodeProcess(Path(folder), "node", cluster_name(), engine="onnx", within=within, lookup="0")
        ends.callback(node.end)
        node.wait_listening()
        client = ends.enter_context(NodeClient(node.url))
        found: list[Server] = []
        for model in models:
            name = str(model.absolute())
            make_ready(client, name, Wanted(slot_count=1, context_length=CONTEXT))
            found.append(ClusterSide(client, chosen(client.cluster(), name)).server)
        yield found


def speed(samples: Sequence[Sample]) -> float:
    """Tokens/s of one answer after its first token."""
    [sample] = samples
    return (sample.new_tokens - 1) / (sample.pieces_s[-1] - sample.pieces_s[0])


def together(servers: Sequence[Server], tokens: int) -> float:
    """Tokens/s of all that answer at once."""
    with ThreadPoolExecutor(len(servers)) as threads:
        asked = [threads.submit(ask_together, server, [PROMPT], tokens) for server in servers]
        return sum(speed(each.result()) for each in asked)


def measure(nodes: dict[str, list[Server]], rounds: int, tokens: int) -> dict[str, dict[str, list[float]]]:
    """Of each node, tokens/s of each round: alone, and in all. Raises `CliError`."""
    found: dict[str, dict[str, list[float]]] = {name: {"alone": [], "at once": []} for name in nodes}
    for number in range(rounds + 1):
        for name, servers in sorted(nodes.items(), reverse=bool(number % 2)):
            row = {"alone": together(servers[:1], tokens), "at once": together(servers, tokens)}
            print(name, {way: round(value, 1) for way, value in row.items()}, flush=True)
            for way, value in row.items() if number else ():  # the first round warms up
                found[name][way].append(value)
    return found


def ratio(over: list[float], under: list[float]) -> str:
    return f"{statistics.median(a / b for a, b in zip(over, under, strict=True)):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs=2, metavar="FILE.gguf")
    parser.add_argument("--against", type=Path, metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=192)
    options = parser.parse_args()
    table = Table("node", "alone: tokens/s", "over this one's", "both at once, in all", "over this one's")
    with ends_by_signal(), ExitStack() as ends:
        sources = {"this": None} | ({"other": options.against} if options.against else {})
        nodes = {name: ends.enter_context(serving(options.models, source)) for name, source in sources.items()}
        found = measure(nodes, options.rounds, options.tokens)
        for name, ways in found.items():
            cells = ([f"{statistics.median(ways[way]):.1f}", ratio(ways[way], found["this"][way])] for way in ways)
            table.add_row(name, *(cell for pair in cells for cell in pair))
    Console().print(table)


if __name__ == "__main__":
    try:
        main()
    except CliError as error:
        sys.exit(str(error))
