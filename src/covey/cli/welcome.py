"""What `covey up` says: where the API is, what to do next and where data lies; then what happens in the cluster."""

import shlex
import time
from typing import Final

from rich.markup import escape

from covey.checkpoints import catalogue
from covey.cli.client import DEFAULT_URL
from covey.cli.naming import with_short_ids
from covey.node import NodeReady
from covey.schema.activity import ActivityEvent, EventKind
from covey.schema.ids import NodeId

TOLD: Final = frozenset(
    {
        EventKind.NODE_JOINED,
        EventKind.NODE_AWAY,
        EventKind.NODE_BACK,
        EventKind.NODE_LEFT,
        EventKind.INSTANCE_PLACED,
        EventKind.INSTANCE_READY,
        EventKind.INSTANCE_REMOVED,
        EventKind.RUNNER_FAILED,
        EventKind.DOWNLOAD_FAILED,
    }
)
TIME_FORMAT: Final = "%H:%M:%S"  # by this machine's clock and zone


def welcome(ready: NodeReady, how_to_join: str) -> str:
    """For a terminal, with markup."""
    elsewhere = [url for url in ready.network_urls if url != ready.url]
    rows = [
        ("API", f"[bold]{escape(ready.url)}/v1[/]{' (from this machine)' if elsewhere else ''}"),
        *(("", f"[bold]{escape(url)}/v1[/] (from others)") for url in elsewhere),
        ("data", escape(str(ready.data_folder))),
        ("models", escape(str(ready.models_folder))),
        ("try", f'covey run {catalogue.listed()[0].model_id} "Why is the sky blue?"{_naming(ready.url)}'),
        ("", f"covey models{_naming(ready.url)} (what can be run; a GGUF file of yours can, too)"),
        ("join", how_to_join),
    ]
    head = f"[bold]{escape(ready.name)}[/] is up (node {ready.node_id[:8]}). Ctrl-C ends it."
    return "\n".join([head, "", *(f"  {title:<8}{text}" for title, text in rows)])


def _naming(url: str) -> str:
    """How a command names the node, for a shell, to which brackets are a pattern; not at all where it would ask there
    anyway.
    """
    return "" if url == DEFAULT_URL else escape(f" --url {shlex.quote(url)}")


def news(event: ActivityEvent, own_id: NodeId) -> str:
    """A line on what happened; none on what only who asks wants to know: `covey events` tells all."""
    if event.kind not in TOLD or (event.kind is EventKind.NODE_JOINED and event.subject == own_id):
        return ""
    return f"{time.strftime(TIME_FORMAT, time.localtime(event.at_ms / 1000))}  {with_short_ids(event.text)}\n"
