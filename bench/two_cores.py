"""Two nodes with one core each against one node with one core, and against llama.cpp with one RPC worker, a core each.

    python bench/two_cores.py FILE.gguf [FILE.gguf ...] [--llama PATH] [--rounds 5] [--requests 8]

Whole nodes on this machine's first two cores, asked over HTTP in turn: one request, and several at once. `--llama`: the
folder with llama.cpp's `llama-bench` and `ggml-rpc-server`, of which one holds half of the layers. Linux only.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the harness lives with the tests

from covey.checkpoints.opening import open_checkpoint
from covey.cli.benching.asking import Sample, Server, ask_together
from covey.cli.benching.cluster import ClusterSide, chosen
from covey.cli.benching.prompts import Prompts
from covey.cli.client import CliError, NodeClient
from covey.cli.demo import ends_by_signal
from covey.cli.local_nodes import first_port
from covey.cli.placing import Wanted, make_ready
from tests.nodes import NodeProcess, cluster_name, until

PROMPT_TOKENS, NEW_TOKENS, SPARE_TOKENS = 256, 128, 128
LLAMA_SECONDS_MAX = 300


def pinned(core: int) -> tuple[str, ...]:
    return ("taskset", "-c", str(core))


@contextmanager
def serving(model: Path, cores: int, slots: int) -> Generator[Server]:
    """A model over so many nodes, with a core each. Raises `CliError`."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ends:
        nodes, cluster = list[NodeProcess](), cluster_name()
        for core in range(cores):
            nodes.append(  # nothing is guessed, as llama-bench guesses nothing
                NodeProcess(Path(folder), f"core{core}", cluster, engine="onnx", within=pinned(core), lookup="0")
            )
            ends.callback(nodes[-1].end)
        for node in nodes:
            node.wait_listening()
        until(lambda: list(nodes[0].visibility().values()) == ["visible"] * cores)
        client = ends.enter_context(NodeClient(nodes[0].url))
        wanted = Wanted(node_count=cores, slot_count=slots, context_length=PROMPT_TOKENS + NEW_TOKENS + SPARE_TOKENS)
        make_ready(client, str(model.absolute()), wanted)
        yield ClusterSide(client, chosen(client.cluster(), None)).server


@contextmanager
def rpc_worker(folder: Path) -> Generator[int]:
    """llama.cpp's, on the second core; its port."""
    port = first_port(0)
    command = [
        *pinned(1),
        str(folder / "ggml-rpc-server"),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--threads",
        "1",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.terminate()
        process.wait(10)


def llama_decode(folder: Path, model: Path, port: int) -> float:
    """Tokens/s of one request, as `llama-bench` has it, after a prompt as long as ours."""
    half = open_checkpoint(model).metadata["llama.block_count"] // 2
    command = [
        *pinned(0), str(folder / "llama-bench"), "--model", str(model), "--rpc", f"127.0.0.1:{port}",
        "--n-gpu-layers", str(half), "--threads", "1", "--n-prompt", "0", "--n-gen", str(NEW_TOKENS),
        "--n-depth", str(PROMPT_TOKENS), "--repetitions", "1", "--output", "json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=LLAMA_SECONDS_MAX, check=True)
    return float(json.loads(done.stdout)[0]["avg_ts"])


def decode_speed(samples: Sequence[Sample]) -> float:
    """Tokens/s of one answer after its first token."""
    [sample] = samples
    return (sample.new_tokens - 1) / (sample.pieces_s[-1] - sample.pieces_s[0])


def total_speed(samples: Sequence[Sample]) -> float:
    """Tokens/s of prompts and answers together."""
    seconds = max(each.ended_s for each in samples) - min(each.sent_s for each in samples)
    return sum(each.prompt_tokens + each.new_tokens for each in samples) / seconds


def measure(model: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Of each round. Raises `CliError`."""
    found: dict[str, list[float]] = {}
    with ExitStack() as ends:
        servers = {cores: ends.enter_context(serving(model, cores, options.requests)) for cores in (1, 2)}
        port = ends.enter_context(rpc_worker(options.llama)) if options.llama else 0
        prompts = Prompts(1, lambda prompt: ask_together(servers[1], [prompt], 1)[0].prompt_tokens)
        for number in range(options.rounds + 1):
            row = dict[str, float]()
            for cores, server in servers.items():
                row[f"one request, {cores}"] = decode_speed(
                    ask_together(server, [prompts.of(PROMPT_TOKENS)], NEW_TOKENS)
                )
                several = [prompts.of(PROMPT_TOKENS) for _ in range(options.requests)]
                row[f"several, {cores}"] = total_speed(ask_together(server, several, NEW_TOKENS))
            if port:
                row["llama.cpp"] = llama_decode(options.llama, model, port)
            print(model.name, {name: round(value, 1) for name, value in row.items()}, flush=True)
            for name, value in row.items() if number else ():  # the first round warms up
                found.setdefault(name, []).append(value)
    return found


def ratio(over: list[float], under: list[float]) -> str:
    return f"{statistics.median(a / b for a, b in zip(over, under, strict=True)):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="FILE.gguf")
    parser.add_argument("--llama", type=Path, help="the folder of llama.cpp's programs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=8)
    options = parser.parse_args()
    several = f"{options.requests} requests (tokens/s in all)"
    table = Table("file", "one request: one core", "two", "llama.cpp", "two / llama.cpp", several, "two", "two / one")
    with ends_by_signal():
        for model in options.models:
            found = measure(model, options)
            median = {name: f"{statistics.median(values):.1f}" for name, values in found.items()}
            pair = found["one request, 2"]
            table.add_row(
                model.stem, median["one request, 1"], median["one request, 2"], median.get("llama.cpp", ""),
                ratio(pair, found["llama.cpp"]) if "llama.cpp" in found else "",
                median["several, 1"], median["several, 2"], ratio(found["several, 2"], found["several, 1"]),
            )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    try:
        main()
    except CliError as error:
        sys.exit(str(error))
