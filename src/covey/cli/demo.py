"""The main job on one machine: nodes that find each other, one model over all of them, one answer."""

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from msgspec import Struct

from covey.cli import chat
from covey.cli.client import DEFAULT_PORT, CliError, NodeClient
from covey.cli.console import err, out
from covey.cli.local_nodes import LocalNode, end_nodes, first_port, start_nodes, wait_together
from covey.cli.placing import Wanted, make_ready
from covey.cli.tables import layers_table, node_names, stage_rows
from covey.effects import paths, scratch
from covey.schema.cluster import Instance

MODEL = "SmolLM2-135M-Instruct"
# The model's own default ("You are a helpful AI assistant named SmolLM …") makes its 4-bit file answer in French.
SYSTEM = "You are a helpful assistant."


class DemoOptions(Struct, frozen=True, kw_only=True):
    """As `covey demo` was called."""

    nodes: int
    once: bool
    prompt: str
    max_tokens: int
    temperature: float
    as_json: bool
    port: int | None  # None: the default one, or the next that is free
    exact: bool = False


def run_demo(options: DemoOptions) -> None:
    """Until the answer (`once`) or until Ctrl-C. Raises `CliError`; leaves no process behind in any case."""
    nodes: list[LocalNode] = []
    with ends_by_signal(), _folder() as folder:
        try:
            start_nodes(folder, options.nodes, _port(options.port), nodes)
            with NodeClient(nodes[0].url) as client:
                _play(options, nodes, client)
        finally:
            end_nodes(nodes)


def _port(asked: int | None) -> int:
    """Says so where it is another one than people expect. Raises `CliError`."""
    port = first_port(asked)
    if asked is None and port != DEFAULT_PORT:
        err.print(f"Port {DEFAULT_PORT} is in use: the API takes {port}.", style="dim")
    return port


@contextmanager
def _folder() -> Generator[Path]:
    """For identities and logs of the nodes. Raises `CliError`."""
    place = paths.home() / "demos"
    with ExitStack() as held:
        try:
            made = held.enter_context(scratch.folder(place))
        except OSError as error:
            raise CliError(
                f"The folder {place} can't be used ({error.strerror or error}): check its permissions and the free "
                "space, or choose another place with COVEY_HOME."
            ) from None
        yield made


@contextmanager
def ends_by_signal() -> Generator[None]:
    """SIGTERM and a closed terminal end what goes on the way Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _play(options: DemoOptions, nodes: list[LocalNode], client: NodeClient) -> None:
    err.print(f"Starting {len(nodes)} node{'s' * (len(nodes) > 1)} on this machine …", style="dim")
    wait_together(nodes)
    instance = make_ready(client, MODEL, Wanted(node_count=len(nodes), exact=options.exact or None)).instance
    rows = stage_rows(instance, node_names(client.cluster()))
    if not options.as_json:
        out.print(f"[bold]{MODEL}[/] ({instance.card.quantization}) is ready:\n")
        out.print(layers_table(rows))
        out.print(f"\nsystem: {SYSTEM}", style="dim", markup=False)
        out.print(f"> {options.prompt}", style="bold", markup=False)
    answer = _ask(options, client, instance)
    if options.as_json:
        chat.write(json.dumps(_report(answer, rows)) + "\n")
    else:
        out.print(f"\n\n{chat.figures(answer)}\n", style="dim", soft_wrap=True)
        chat.cut_short(answer, {"max_tokens": options.max_tokens})
    if not options.once:
        _serve(options, nodes)


def _ask(options: DemoOptions, client: NodeClient, instance: Instance) -> chat.Answer:
    body = {
        "model": instance.card.model_id,
        "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": options.prompt}],
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
    }

    def silent(_: str) -> None:
        """With --json the text is in the object."""

    return chat.ask(client, body, silent if options.as_json else chat.write)


def _report(answer: chat.Answer, rows: list[dict[str, Any]]) -> dict[str, Any]:
    assert answer.finished is not None, "an answer that has ended"
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.finished.usage.cached_tokens,
        "prefill_tokens_per_second": round(answer.prefill_tokens_per_second, 2),
        "decode_tokens_per_second": round(answer.decode_tokens_per_second, 2),
        "nodes": [{key: row[key] for key in ("name", "layers", "memory_bytes")} for row in rows],
    }


def _command() -> str:
    """How a person calls this program: where the shell would not find it, by its path."""
    return "covey" if shutil.which("covey") else os.path.relpath(sys.argv[0])


def _serve(options: DemoOptions, nodes: list[LocalNode]) -> None:
    """Until Ctrl-C, or until a node ends by itself."""
    if not options.as_json:
        out.print(f"The API is at [bold]{nodes[0].url}/v1[/] (OpenAI's chat completions). Try in another terminal:\n")
        out.print(f'  {_command()} run {MODEL} --system "{SYSTEM}" --url {nodes[0].url}\n', soft_wrap=True)
        out.print("Ctrl-C ends all nodes.", style="dim")
    pause = threading.Event()
    while not pause.wait(1.0):
        for node in nodes:
            node.check()
