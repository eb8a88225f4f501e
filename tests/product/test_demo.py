"""The main job as a person runs it: nodes start, find each other, share a model, answer, and leave nothing behind."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

DEMO_SECONDS_MAX = 180


def demo(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `covey demo` with its data under `home` and no way to a package registry."""
    environment = {**os.environ, "COVEY_HOME": str(home), "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    command = [sys.executable, "-m", "covey.cli", "demo", *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=DEMO_SECONDS_MAX, check=False
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    """A data home whose models folder already holds the demo model, so that a demo runs offline."""
    from covey.checkpoints import catalogue

    card = catalogue.find("SmolLM2-135M-Instruct")
    assert card is not None
    folder = tmp_path_factory.mktemp("home")
    target = folder / "models" / catalogue.file_name(card.source)
    target.parent.mkdir(parents=True)
    target.symlink_to(demo_model)
    return folder


@pytest.fixture(scope="module")
def answers(home: Path) -> dict[int, dict[str, Any]]:
    """The greedy answer of one, two and three nodes."""
    found: dict[int, dict[str, Any]] = {}
    for nodes in (1, 2, 3):
        options = ["--nodes", str(nodes), "--once", "--json", "--temperature", "0", "--max-tokens", "32"]
        done = demo(home, *options)
        assert done.returncode == 0, done.stderr
        found[nodes] = json.loads(done.stdout)
    return found


def test_one_two_and_three_nodes_give_the_same_ids(answers: dict[int, dict[str, Any]]) -> None:
    assert answers[1]["token_ids"] == answers[2]["token_ids"] == answers[3]["token_ids"]


def test_the_answer_names_paris(answers: dict[int, dict[str, Any]]) -> None:
    assert "Paris" in answers[2]["text"]


def test_the_layers_are_split_over_all_nodes(answers: dict[int, dict[str, Any]]) -> None:
    for count, answer in answers.items():
        ranges = sorted(tuple(node["layers"]) for node in answer["nodes"])
        assert len(ranges) == count
        assert ranges[0][0] == 0
        assert ranges[-1][1] == 30
        assert all(left[1] == right[0] for left, right in itertools.pairwise(ranges))


def test_a_demo_that_is_killed_takes_its_nodes_and_runners_along(home: Path) -> None:
    environment = {**os.environ, "COVEY_HOME": str(home)}
    command = [sys.executable, "-m", "covey.cli", "demo", "--nodes", "2", "--json"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    try:
        assert json.loads(process.stdout.readline())["nodes"]  # all is running
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) == 6  # two nodes, each with its mesh and a runner
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    left = psutil.wait_procs(family, timeout=10)[1]
    for each in left:
        each.kill()
    assert left == []


def test_nothing_is_left_running(answers: dict[int, dict[str, Any]], home: Path) -> None:
    assert answers
    left: list[str] = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("COVEY_HOME") == str(home) and process.pid != os.getpid():
                left.append(" ".join(process.cmdline()))
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    assert left == []
