"""`covey bench` against a real node with the fake engine, alone and beside a program that stands in for llama.cpp's."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import psutil
import pytest
from click.testing import Result
from typer.testing import CliRunner

from covey.cli.benching import asking, llama_server
from covey.cli.benching.figures import MEASURES, Case
from covey.cli.client import CliError
from covey.cli.main import app
from covey.schema.generation import GenerationFailed
from tests.cli.served_node import ServedNode
from tests.nodes import NodeProcess, running, until
from tests.tiny_model import write_model

STAND_IN = Path(__file__).with_name("stand_in_server.py")
SMALL = ("--prompt-tokens", "200", "--new-tokens", "12")
END_S_MAX = 20


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[NodeProcess, Path]]:
    """A node that serves a tiny model in four slots of 512 tokens."""
    home = tmp_path_factory.mktemp("bench")
    model = write_model(home / "tiny.gguf")
    with running(home, "a") as (node,):
        node.post("/place_instance", {"model_id": str(model), "context_length": 512, "slot_count": 4})
        until(lambda: list(node.runners().values()) == ["Ready"])
        yield node, model


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that is called as `llama-server` is; what it was asked is in `prompts.txt` beside it."""
    program = tmp_path / "llama-server"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STAND_IN}" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PROMPTS", str(tmp_path / "prompts.txt"))
    return program


def bench(url: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments], env={"COVEY_URL": url, "COLUMNS": "200"})


def test_figures_table_file_and_picture(served: tuple[NodeProcess, Path], tmp_path: Path) -> None:
    node, model = served
    files = ("--json", str(tmp_path / "found.json"), "--plot", str(tmp_path / "found.svg"))
    done = bench(node.url, *SMALL, "--concurrency", "1", "--concurrency", "3", "--repeats", "3", *files)
    assert done.exit_code == 0, done.output
    assert "200 + 12 tokens, 3 at once" in done.stdout
    assert "prefix cache" not in done.output
    assert "Medians of the rounds; `covey bench --help` says what each figure is." in done.stderr
    assert done.stdout.count("3 rounds") == 2

    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["model_id"], found["is_complete"], found["repeats"]) == (str(model), True, 3)
    assert found["machines"][0]["cores"] >= 1
    assert found["instances"][0]["slots"] == 4
    assert set(found["units"]) == set(MEASURES)
    assert [case["concurrency"] for case in found["cases"]] == [1, 3]
    for case in found["cases"]:
        assert list(case["servers"]) == ["covey"]
        assert case["times_as_good"] is None
        check_sums(case["servers"]["covey"], case["concurrency"])

    picture = ET.parse(tmp_path / "found.svg").getroot()  # noqa: S314 (our own)
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"


def check_sums(server: dict[str, Any], concurrency: int) -> None:
    """What is said of the rounds follows from the samples in them."""
    rounds = server["rounds"]
    assert len(rounds) == 3
    for measured in rounds:
        samples = measured["samples"]
        assert [sample["new_tokens"] for sample in samples] == [12] * concurrency  # also past the model's own end
        assert all(abs(sample["prompt_tokens"] - 200) < 40 for sample in samples)  # words of bytes differ in length
        tokens = sum(sample["prompt_tokens"] + sample["new_tokens"] for sample in samples)
        assert measured["total"] == pytest.approx(tokens / measured["seconds"])
        for sample in samples:
            times = [sample["sent_s"], *sample["pieces_s"], sample["ended_s"]]
            assert times == sorted(times)
        assert measured["first_token"] >= 5  # a step takes 5 ms
        assert measured["memory"] > 1
    assert server["medians"]["total"] == sorted(measured["total"] for measured in rounds)[1]


def test_help_says_what_each_figure_is() -> None:
    shown = bench("", "--help").stdout
    for measure in MEASURES.values():
        assert f"- {measure.title.partition(',')[0]}: " in shown
    assert "`covey ps` tells what is set aside for them" in shown


def test_a_shared_prefix_is_in_the_cache_and_other_prompts_are_not(
    served: tuple[NodeProcess, Path], tmp_path: Path
) -> None:
    node, _ = served
    cached = {}
    for shared in ("0", "150"):
        file = tmp_path / f"{shared}.json"
        options = ("--shared-prefix", shared, "--repeats", "2", "--json", str(file))
        assert bench(node.url, *SMALL, *options).exit_code == 0
        (case,) = json.loads(file.read_text())["cases"]
        samples = [sample for each in case["servers"]["covey"]["rounds"] for sample in each["samples"]]
        cached[shared] = [sample["cached_tokens"] for sample in samples]
    assert max(cached["0"]) < 30  # the template's own words
    assert min(cached["150"]) > 100


# ---- beside another server ----


def test_both_are_asked_the_same_in_turn(served: tuple[NodeProcess, Path], stand_in: Path, tmp_path: Path) -> None:
    node, model = served
    file = tmp_path / "found.json"
    asked = ("--against", "llama.cpp", "--llama-server", str(stand_in), "--threads", "1")
    done = bench(node.url, *SMALL, "--concurrency", "2", "--repeats", "3", "--json", str(file), *asked)
    assert done.exit_code == 0, done.output
    assert "times as good" in done.stdout
    assert "Above 1 Covey is the better one" in done.stderr

    found = json.loads(file.read_text())
    (command,) = found["against"]
    assert command[:3] == [str(stand_in), "--model", str(model)]
    assert command[command.index("--threads") + 1] == "1"
    assert command[command.index("--parallel") + 1] == "2"
    assert int(command[command.index("--ctx-size") + 1]) >= 2 * 212
    (case,) = found["cases"]
    assert list(case["servers"]) == ["covey", "llama.cpp"]
    prompts = (tmp_path / "prompts.txt").read_text().splitlines()
    assert len(prompts) == len(set(prompts)) == 2 * 4  # a warm-up round and three that count
    ours, theirs = (case["servers"][name]["rounds"] for name in ("covey", "llama.cpp"))
    quotients = sorted(our["total"] / their["total"] for our, their in zip(ours, theirs, strict=True))
    told = case["times_as_good"]["total"]
    assert [told["least"], told["median"], told["most"]] == pytest.approx(quotients)
    assert case["times_as_good"]["memory"] is not None
    ends = [max(sample["ended_s"] for sample in each["samples"]) for each in theirs]
    assert all(end < 5 for end in ends)


def start(stand_in: Path, model: Path) -> list[str]:
    return llama_server.command(stand_in, model, 1, [Case(20, 5, 1)])


def test_the_other_server_stands_still_but_for_its_turns(stand_in: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny.gguf")
    with llama_server.running(start(stand_in, model), "tiny") as server:
        assert server._process is not None
        process = psutil.Process(server._process.pid)
        until(lambda: process.status() == psutil.STATUS_STOPPED, 5)
        with server.turn():
            (sample,) = asking.ask_together(server.server, ["a b c"], 5)
        assert (sample.prompt_tokens, sample.new_tokens, len(sample.pieces_s)) == (3, 5, 5)
        until(lambda: process.status() == psutil.STATUS_STOPPED, 5)
        assert server.memory_bytes() > 1_000_000
    assert not process.is_running()


def test_a_server_that_does_not_start_says_why(stand_in: Path, tmp_path: Path) -> None:
    command = start(stand_in, tmp_path / "missing.gguf")
    with pytest.raises(CliError, match=r"ended with status 1:\nerror: failed to open GGUF file"):  # noqa: SIM117
        with llama_server.running(command, "tiny"):
            pass


@pytest.fixture
def endless(served: tuple[NodeProcess, Path], stand_in: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A measurement of a thousand rounds that has come to its third."""
    node, _ = served
    options = ["--repeats", "1000", "--json", str(tmp_path / "found.json"), "--llama-server", str(stand_in)]
    command = [sys.executable, "-m", "covey.cli", "bench", *SMALL, *options, "--against", "llama.cpp"]
    environment = {**os.environ, "COVEY_URL": node.url}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    prompts = tmp_path / "prompts.txt"
    until(lambda: prompts.exists() and prompts.read_text().count("\n") >= 3, 60)
    yield process
    process.kill()
    process.communicate()


def test_interrupted_it_tells_what_it_has(endless: subprocess.Popen[str], tmp_path: Path) -> None:
    """By Ctrl-C: pairs of rounds that are whole count, and the other server ends."""
    (other,) = psutil.Process(endless.pid).children()
    endless.send_signal(signal.SIGINT)
    out, told = endless.communicate(timeout=END_S_MAX)
    assert endless.returncode == 130
    assert "total, tokens/s" in out
    assert "of 1000 rounds" in out
    assert "Ended early, with " in told
    found = json.loads((tmp_path / "found.json").read_text())
    assert not found["is_complete"]
    (case,) = found["cases"]
    ours, theirs = (case["servers"][name]["rounds"] for name in ("covey", "llama.cpp"))
    assert 1 <= len(ours) == len(theirs) < 1000
    assert not other.is_running()


@pytest.mark.skipif(sys.platform != "linux", reason="no other kernel ends a process with its parent")
def test_killed_it_leaves_no_server(endless: subprocess.Popen[str]) -> None:
    (other,) = psutil.Process(endless.pid).children()
    endless.kill()
    assert psutil.wait_procs([other], timeout=END_S_MAX)[1] == []


# ---- what goes wrong ----


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--prompt-tokens", "500", "--new-tokens", "13"], "500 tokens and 13 new ones do not fit into the context of"),
        (["--prompt-tokens", "2", "--new-tokens", "2"], "A prompt of 2 tokens is too short"),
        (["nothing"], "There is no instance 'nothing'; there are:"),
        (["--llama-server", "x"], "--llama-server and --threads belong to --against llama.cpp"),
        (["--threads", "2"], "--llama-server and --threads belong to --against llama.cpp"),
        (["--against", "vllm"], "'vllm' is not one of 'llama.cpp'"),
        ([*SMALL, "--against", "llama.cpp", "--llama-server", "/missing"], "/missing is no program: build llama.cpp"),
        ([*SMALL, "--against", "llama.cpp", "--llama-server", "false"], "llama-server ended with status 1"),
        (["--concurrency", "0"], "greater than or equal to 1"),
        (["--concurrency", "257"], "less than or equal to 256"),
        (["--plot", "found.png"], "name a file that ends with .svg"),
        (["--json", "/missing/found.json"], "There is no folder /missing"),
        (["--json", "/"], "/ is a folder: name a file."),
    ],
)
def test_what_is_asked_for_wrongly(served: tuple[NodeProcess, Path], options: list[str], sentence: str) -> None:
    node, _ = served
    done = bench(node.url, *options)
    assert done.exit_code in {1, 2}
    assert sentence in " ".join(done.output.replace("│", " ").split())
    assert "Traceback" not in done.output


def test_more_requests_than_slots_are_told(served: tuple[NodeProcess, Path]) -> None:
    node, _ = served
    done = bench(node.url, *SMALL, "--concurrency", "6", "--repeats", "1", "--warm-up", "0")
    assert done.exit_code == 0, done.output
    assert "has 4 slots, so of 6 requests at once 2 wait: `covey place --slots N` makes more." in done.stderr


def test_no_node_and_no_model(node: ServedNode) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert "No node answers at" in bench(f"127.0.0.1:{port}").stderr
    node.backend.current = type(node.backend.current)(
        node_id=node.backend.node_id, leader=None, revision=1, members=(), wishes=(), instances=()
    )
    assert "No model is ready, so there is nothing to measure" in bench(node.url).stderr


def test_another_server_is_on_another_machine(node: ServedNode, stand_in: Path) -> None:
    """The two nodes of this cluster are two machines."""
    done = bench(node.url, *SMALL, "--against", "llama.cpp", "--llama-server", str(stand_in))
    assert done.exit_code == 1
    assert "compares two servers on one machine" in done.stderr


def test_a_refusal_is_told_in_the_nodes_own_words(node: ServedNode) -> None:
    node.backend.events = (GenerationFailed("Tiny-Chat is busy.", 429),)
    done = bench(node.url, *SMALL)
    assert done.exit_code == 1
    assert "covey refuses: Tiny-Chat is busy." in done.stderr


@contextmanager
def server_that_says(body: bytes, status: int = 200) -> Iterator[asking.Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield asking.Server("it", f"http://127.0.0.1:{server.server_port}", "tiny")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}\n\n'


def test_chunks_may_come_in_any_pieces() -> None:
    text = b': hello\n\ndata: {"choices": [{"delta": {"content": "a"}}]}\r\n\r\ndata: [DONE]\n\n'
    with server_that_says(USAGE + text) as server:
        (sample,) = asking.ask_together(server, ["?"], 2)
    assert (len(sample.pieces_s), sample.prompt_tokens, sample.new_tokens) == (1, 3, 2)
    split = [(float(place), bytes([byte])) for place, byte in enumerate(text)]
    assert [data for _, data in asking._events(split)] == [text.split(b"data: ")[1].strip(), b"[DONE]"]
    assert next(asking._events(split))[0] == text.index(b"\r\n") + 1


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b'{"error": {"message": "Too long."}}', 400, r"^it refuses: Too long\.$"),
        (b"<html>", 502, r"^it refuses: status 502\.$"),
        (b'data: {"error": {"message": "No memory."}}\n\n', 200, r"^it gave up: No memory\.$"),
        (b'data: {"choices": []}\n\n', 200, r"ended its answer without saying how long it is\.$"),
        (b"data: nonsense\n\n", 200, "sent something that is no answer"),
        (b"", 200, "ended its answer"),
    ],
)
def test_odd_answers_are_one_sentence(body: bytes, status: int, sentence: str) -> None:
    with server_that_says(body, status) as server, pytest.raises(CliError, match=sentence):
        asking.ask_together(server, ["?", "!"], 2)


def test_one_that_breaks_off_ends_all() -> None:
    """The first to come is cut, the second would be silent for ten minutes."""

    def serve(listener: socket.socket) -> None:
        connections = [listener.accept()[0] for _ in range(2)]
        asked = [connection.recv(65536) for connection in connections]
        assert all(asked)
        connections[0].close()
        time.sleep(0.2)
        until(lambda: connections[1].recv(65536) == b"", 10)
        connections[1].close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        server = asking.Server("it", f"http://127.0.0.1:{listener.getsockname()[1]}", "tiny")
        with pytest.raises(CliError, match=r"^it at http://127.0.0.1:\d+ broke off: "):
            asking.ask_together(server, ["?", "!"], 2)
        thread.join(10)
        assert not thread.is_alive()
