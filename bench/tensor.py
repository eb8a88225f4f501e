"""Tensor parallel: two ranks with a core each against one process with a core, in alternating rounds, on Linux.

    python bench/tensor.py [--rounds 5] [--kinds Q4_0 Q4_1] [--layers 16]

The model has the shape of a Llama of 1 B (hidden 2048, 16 layers, 32 query and 8 key-value heads, inner 8192, 32,000
words) and random weights, in a temporary folder of 0.7 GB. A round is a prompt of 512 tokens and 24 decode steps
from an empty cache, by the process alone, by two such processes at once, and by both ranks, whose sums go over mutual
TLS on loopback. Medians of the rounds are printed, those of the ratio of neighbouring rounds, and what one sum of 8 KB
takes. Two processes at once share nothing but the machine: what they do together is the most that two ranks could.
"""

import argparse
import multiprocessing
import os
import socket
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
from bare_engine import spec_of
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace
from one_billion import HEAD, HEADS, HIDDEN, INNER, KV_HEADS, shapes
from rich.console import Console
from rich.table import Table

from covey.control.join_code import JoinCode
from covey.effects.identity import Identity, node_id_of
from covey.effects.trust import make_credentials
from covey.engine.contract import ALONE, Exchange, Piece
from covey.engine.exchange import ChannelExchange
from covey.engine.onnx.stage import OnnxStage
from covey.engine.tls import Channel, client_context, server_context
from covey.schema.trust import Credentials

VOCABULARY = 32_000
PREFILL_TOKENS, DECODE_TOKENS, SUMS = 512, 24, 1000
WAIT_SECONDS = 60.0
MEASURES = ("prefill", "decode")


def write_model(path: Path, kind: str, layers: int) -> Path:
    """Random codes; the scales give weights of about the size that training gives."""
    writer, generator = gguf.GGUFWriter(path, "llama"), np.random.default_rng(1)
    writer.add_block_count(layers)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_context_length(4096)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500_000.0)
    writer.add_rope_dimension_count(HEAD)
    for name, shape in shapes(VOCABULARY, layers).items():
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
        else:
            writer.add_tensor(name, random_blocks(generator, kind, shape), raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(generator: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    content = generator.integers(0, 256, (shape[0], shape[1] // elements, size), np.uint8)
    scale = 0.2 / np.sqrt(shape[1])
    content[..., 0:2] = np.array([scale], np.float16).view(np.uint8)
    if kind == "Q4_1":
        content[..., 2:4] = np.array([-7.4 * scale], np.float16).view(np.uint8)
    return content.reshape(shape[0], -1)


# ---- in the processes ----


def credentials(rank: int) -> Credentials:
    key = Ed25519PrivateKey.from_private_bytes(rank.to_bytes(32, "big"))
    return make_credentials(JoinCode(bytes(16)), Identity(node_id_of(key), 1, key))


def meet(rank: int, parent: Connection) -> ChannelExchange:
    """Rank 0 listens, and the parent passes its port on."""
    if rank == 0:
        with socket.create_server(("127.0.0.1", 0)) as server:
            parent.send(server.getsockname()[1])
            channel = Channel(server.accept()[0], server_context(credentials(0)), is_server=True)
    else:
        connection = socket.create_connection(("127.0.0.1", parent.recv()), WAIT_SECONDS)
        channel = Channel(connection, client_context(credentials(1)), is_server=False)
    channel.shake_hands(time.monotonic() + WAIT_SECONDS)
    return ChannelExchange(rank, {1 - rank: channel})


def work(model: Path, rank: int | None, core: int, parent: Connection) -> None:
    """Measures a round whenever it is told to; `rank` is None for the process that is alone."""
    os.sched_setaffinity(0, {core})
    exchange = ALONE if rank is None else meet(rank, parent)
    spec = spec_of(model, 1, PREFILL_TOKENS + DECODE_TOKENS)
    stage = OnnxStage()
    stage.load(replace(spec, rank=exchange.rank, rank_count=exchange.count), lambda _: None, exchange)
    stage.warm_up()
    parent.send("ready")
    while (order := parent.recv()) is not None:
        parent.send(measure(stage) if order == "round" else sum_us(exchange))


def measure(stage: OnnxStage) -> dict[str, float]:
    """Tokens per second."""
    token_ids = np.random.default_rng(1).integers(0, VOCABULARY, PREFILL_TOKENS)
    begun = time.perf_counter()
    stage.run([Piece(0, 0, PREFILL_TOKENS, wants_logits=True)], token_ids)
    prefilled = time.perf_counter()
    for index in range(DECODE_TOKENS):
        stage.run([Piece(0, PREFILL_TOKENS + index, 1, wants_logits=True)], token_ids[index : index + 1])
    decoded = time.perf_counter()
    return {"prefill": PREFILL_TOKENS / (prefilled - begun), "decode": DECODE_TOKENS / (decoded - prefilled)}


def sum_us(exchange: Exchange) -> float:
    """Of one token's values, the median."""
    values, times = np.zeros((1, HIDDEN), np.float32), list[float]()
    for _ in range(SUMS):
        begun = time.perf_counter()
        exchange.add_up(values)
        times.append(time.perf_counter() - begun)
    return 1e6 * median(times)


# ---- the parent ----


@contextmanager
def processes(model: Path) -> Iterator[dict[str, Connection]]:
    """Alone on each of two cores, and a rank on each; none computes while it was not told to."""
    context, first, *others = multiprocessing.get_context("spawn"), *sorted(os.sched_getaffinity(0))
    second = (others or [first])[0]
    places: dict[str, tuple[int | None, int]] = {
        "alone": (None, first), "beside": (None, second), "rank 0": (0, first), "rank 1": (1, second),
    }  # fmt: skip
    connections: dict[str, Connection] = {}
    started: list[Any] = []
    for name, (rank, core) in places.items():
        connections[name], theirs = context.Pipe()
        started.append(context.Process(target=work, args=(model, rank, core, theirs), daemon=True))
        started[-1].start()
    connections["rank 1"].send(connections["rank 0"].recv())
    for connection in connections.values():
        assert connection.recv() == "ready"
    try:
        yield connections
    finally:
        for connection, process in zip(connections.values(), started, strict=True):
            connection.send(None)
            process.join(WAIT_SECONDS)


def told(connections: list[Connection], order: str) -> list[Any]:
    for connection in connections:
        connection.send(order)
    return [connection.recv() for connection in connections]


def compare(model: Path, rounds: int) -> tuple[dict[str, dict[str, float]], float]:
    """Medians, and the microseconds of a sum."""
    found: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
    with processes(model) as connections:
        alone, beside, *ranks = connections.values()
        for _ in range(rounds):
            [one], twice, [both, _] = told([alone], "round"), told([alone, beside], "round"), told(ranks, "round")
            together = {name: float(sum(each[name] for each in twice)) for name in MEASURES}
            found["one core"].append(one)
            found["two processes"].append(together)
            found["two ranks"].append(both)
            found["ratio: processes"].append({name: together[name] / one[name] for name in MEASURES})
            found["ratio: ranks"].append({name: both[name] / one[name] for name in MEASURES})
        microseconds = told(ranks, "sum")[0]
    medians = {name: {each: median(at[each] for at in every) for each in MEASURES} for name, every in found.items()}
    return medians, microseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=("Q4_0", "Q4_1"), default=["Q4_0", "Q4_1"])
    parser.add_argument("--layers", type=int, default=16)
    options = parser.parse_args()
    table = Table(title=f"Llama of 1 B, {options.layers} layers, a core each, medians of {options.rounds} rounds")
    for heading in ("", "", f"prefill {PREFILL_TOKENS} (tokens/s)", f"decode {DECODE_TOKENS} (tokens/s)", "sum (us)"):
        table.add_column(heading, justify="right")
    for kind in options.kinds:
        with TemporaryDirectory() as folder:
            medians, microseconds = compare(
                write_model(Path(folder) / "model.gguf", kind, options.layers), options.rounds
            )
        for name, figures in medians.items():
            shown = (f"{figures[measure]:.2f}" for measure in MEASURES)
            table.add_row(kind, name, *shown, f"{microseconds:.0f}" if name == "two ranks" else "")
    Console().print(table)


if __name__ == "__main__":
    main()
