"""The README's first hour on two machines, with its own commands: start, join by code, first model, first chat.

Installing aside: Covey and the model's file are there.
"""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from lab import Host, Lab
from up import until

from covey.checkpoints import catalogue

README = (Path(__file__).parents[2] / "README.md").read_text()
MODEL = "SmolLM2-135M-Instruct"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")
COMMAND_S_MAX = 400.0  # an answer without a limit may ramble through all of its context
START_S_MAX = 60.0
SEEN_S_MAX = 15.0


class Machine:
    """One host, with a home of its own and a person at its keyboard."""

    def __init__(self, host: Host, home: Path, model: Path) -> None:
        self.host = host
        card = catalogue.find(MODEL)
        assert card is not None
        file = home / "models" / catalogue.file_name(card.source)
        file.parent.mkdir(parents=True)
        file.symlink_to(model)
        chosen = {"COVEY_HOME": str(home), "HOME": str(home), "TERM": "xterm"}
        chosen["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("COVEY_")} | chosen

    def at_keyboard(self, command: str) -> list[str]:
        """The command as a person types it here, where the machine has its own name, too."""
        return self.host.run("unshare", "--uts", "sh", "-c", f"hostname {self.host.name} && {command}")

    def run(self, command: str) -> str:
        """What it prints; it must succeed."""
        done = subprocess.run(
            self.at_keyboard(command),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_S_MAX,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def names(self) -> set[str]:
        """Of the nodes that are seen."""
        nodes = json.loads(self.run("covey nodes --json"))
        return {node["name"] for node in nodes if node["visibility"] == "visible"}


class Terminal:
    """A command that goes on, and all that its window has shown."""

    def __init__(self, machine: Machine, command: str) -> None:
        self._window, its_end = pty.openpty()
        self.process = subprocess.Popen(
            machine.at_keyboard(f"exec {command}"),
            env=machine.environment,
            stdin=its_end,
            stdout=its_end,
            stderr=its_end,
            start_new_session=True,
        )
        os.close(its_end)
        self._shown = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def text(self) -> str:
        return ESCAPES.sub("", self._shown.decode(errors="replace"))

    def wait_for(self, words: str, timeout_s: float = START_S_MAX) -> str:
        """What was shown until then, and they are."""
        until(lambda: words in self.text(), timeout_s, self.text)
        return self.text()

    def interrupt(self) -> int:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(20)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(5)
        os.close(self._window)

    def _read(self) -> None:
        with suppress(OSError):  # the last one who wrote has gone
            while data := os.read(self._window, 4096):
                self._shown += data


def told(command: str) -> str:
    """The command, which the README gives to a reader as it stands here."""
    assert re.search(rf"^ {{4}}{re.escape(command)}( +#.*)?$", README, re.MULTILINE), f"not in README.md: {command}"
    return command


def curl_told() -> str:
    found = re.search(r"^ {4}(curl .*\\\n.*)$", README, re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.mark.net
def test_the_first_hour(net: Lab, tmp_path: Path, demo_model: Path) -> None:
    lan = net.switch()
    hosts = [net.host(name, lan, f"10.77.0.{number}/24") for number, name in enumerate(("ada", "bob"), 1)]
    ada, bob = (Machine(host, tmp_path / host.name, demo_model) for host in hosts)
    windows: list[Terminal] = []
    try:
        play(ada, bob, windows)
    finally:
        for window in windows:
            window.close()


def play(ada: Machine, bob: Machine, windows: list[Terminal]) -> None:
    started_s = time.monotonic()
    windows.append(Terminal(ada, told("covey up")))
    greeting = windows[0].wait_for("(on another device)")
    [join] = re.findall(r"join +(covey up --join \S+)", greeting)
    assert join in ada.run("covey join-code")
    (asking,) = re.findall(r"try +(covey run .*)", greeting)
    assert asking == told(f'covey run {MODEL} "Why is the sky blue?"')
    alone = ada.run(asking)
    print(f"first answer after {time.monotonic() - started_s:.0f} s: {alone.strip()[:60]}")
    assert len(alone) > 20

    joined_s = time.monotonic()
    windows.append(Terminal(bob, join))
    windows[1].wait_for("is up")
    assert "This device joins cluster" in windows[1].text()
    until(lambda: len(bob.names()) == len(ada.names()) == 2, SEEN_S_MAX)
    print(f"two machines are one cluster {time.monotonic() - joined_s:.0f} s after the second one's command")
    windows[0].wait_for("bob", SEEN_S_MAX)

    assert MODEL in bob.run("covey models")
    assert bob.run(asking).strip()  # served by the first machine
    ada.run(f"covey stop {MODEL}")
    bob.run(told("covey place MODEL --nodes 2 --context 4096").replace("MODEL", MODEL))
    until(lambda: "ready" in bob.run("covey ps"), COMMAND_S_MAX, lambda: bob.run("covey ps"))
    if shutil.which("curl"):
        answers = [json.loads(machine.run(curl_told())) for machine in (ada, bob)]
        assert all(answer["choices"][0]["message"]["content"] for answer in answers)
    assert MODEL in ada.run("covey events")

    assert windows[1].interrupt() == 0
    windows.append(Terminal(bob, told("covey up")))  # from then on `covey up` is enough
    until(lambda: windows[2].text().count("is up") and len(ada.names()) == 2, START_S_MAX, windows[2].text)
    until(lambda: "ready" in ada.run("covey ps"), COMMAND_S_MAX)
    assert ada.run(asking).strip()
    bob.run(told("covey stop MODEL").replace("MODEL", MODEL))
