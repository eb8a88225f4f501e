"""Who starts a node for the first time sees what to do next."""

import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from covey.cli.log import Log
from covey.cli.welcome import news, welcome
from covey.node import NodeReady
from covey.schema.activity import ActivityEvent, EventKind
from covey.schema.ids import NodeId

READY = NodeReady(
    node_id=NodeId("0123456789abcdef"),
    name="attic [b]",
    url="http://127.0.0.1:52415",
    network_urls=(),
    data_folder=Path("/data/node"),
    models_folder=Path("/data/models"),
)


def test_a_node_for_this_machine() -> None:
    assert welcome(READY, "covey up --join CODE").splitlines() == [
        r"[bold]attic \[b][/] is up (node 01234567). Ctrl-C ends it.",
        "",
        "  API     [bold]http://127.0.0.1:52415/v1[/]",
        "  data    /data/node",
        "  models  /data/models",
        '  try     covey run SmolLM2-135M-Instruct "Why is the sky blue?"',
        "          covey models (what can be run; a GGUF file of yours can, too)",
        "  join    covey up --join CODE",
    ]


def test_a_node_that_others_reach() -> None:
    urls = ("http://10.0.0.9:5000", "http://192.168.1.5:5000")
    ready = msgspec.structs.replace(READY, url="http://127.0.0.1:5000", network_urls=urls)
    text = welcome(ready, "")
    assert "http://127.0.0.1:5000/v1[/] (from this machine)" in text
    assert all(f"{url}/v1[/] (from others)" in text for url in urls)
    assert "covey models --url http://127.0.0.1:5000 " in text


def test_an_address_in_brackets_is_printed_as_it_is() -> None:
    """Rich takes what stands in brackets for markup, and a shell for a pattern."""
    ready = msgspec.structs.replace(READY, url="http://[fd00::5]:52415", network_urls=("http://[fe00::5]:52415",))
    with Console(width=200) as console, console.capture() as printed:
        console.print(welcome(ready, ""), soft_wrap=True)
    lines = printed.get().splitlines()
    assert lines[2:4] == [
        "  API     http://[fd00::5]:52415/v1 (from this machine)",
        "          http://[fe00::5]:52415/v1 (from others)",
    ]
    assert lines[6].endswith("\"Why is the sky blue?\" --url 'http://[fd00::5]:52415'")
    assert "covey models --url 'http://[fd00::5]:52415' (" in lines[7]


def test_a_node_at_one_address_is_reached_there_from_everywhere() -> None:
    ready = msgspec.structs.replace(READY, url="http://10.0.0.9:52415", network_urls=("http://10.0.0.9:52415",))
    assert "(from" not in welcome(ready, "")


def event(kind: EventKind, subject: str = "berta", text: str = "berta joined.") -> ActivityEvent:
    return ActivityEvent(number=1, at_ms=1_700_000_000_000, kind=kind, subject=subject, text=text)


def test_what_happens_is_a_line_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "localtime", time.gmtime)
    assert news(event(EventKind.NODE_JOINED), READY.node_id) == "22:13:20  berta joined.\n"
    assert news(event(EventKind.NODE_JOINED, READY.node_id), READY.node_id) == ""
    assert news(event(EventKind.KEY_ADDED), READY.node_id) == ""


@pytest.mark.parametrize(("is_quiet", "lines"), [(False, 1), (True, 0)])
def test_a_quiet_node_tells_nothing(capfd: pytest.CaptureFixture[str], lines: int, *, is_quiet: bool) -> None:
    Log(str, is_quiet=is_quiet).tell(event(EventKind.RUNNER_FAILED))
    assert capfd.readouterr().out.count("berta joined.\n") == lines


def test_a_reader_that_leaves_does_not_end_the_node() -> None:
    code = """
from covey.cli.log import Log
from tests.cli.test_welcome import EventKind, event
input()
log = Log(str, is_quiet=False)
for _ in range(3):
    log.tell(event(EventKind.NODE_JOINED))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.wait(30) == 0
