"""An hour in a bad home: every 20 s a node is killed or stands still, and people go on asking at one that lives.

`make churn MINUTES=60` is the hour, `SEED` draws another one. Whoever asks is answered, or refused with a reason; and
what the node that lives holds at the end is what it held at the beginning.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from threading import Event, Lock, Thread
from typing import Any

import census
import httpx
import psutil
import pytest
from rig import ASKED, NAMES, SLOTS, Rig, local, until

MINUTES = float(os.environ.get("FAULTS_MINUTES", "1"))
SEED = int(os.environ.get("FAULTS_SEED", "1"))
EVERY_S = 20.0
LASTS_S = 8.0  # then it is started again, or goes on
ANSWER_S_MAX = 240.0  # who waits for longer counts as hung
LOOK_S = 5.0
GROWN_BYTES_MAX = 30 * census.MIB  # of the node that lives, from the first third of the time to the last
DESCRIPTORS_GROWN_MAX = 8
SETTLE_S_MAX = 60.0


@dataclass
class Tally:
    """What became of the requests; `bad` are those that ended without a word, or not at all."""

    ended: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    took_s: list[float] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)

    def add(self, how: str, reason: str, took_s: float) -> None:
        with self.lock:
            self.ended[how] += 1
            self.took_s.append(took_s)
            if reason:
                self.reasons[reason[:120]] += 1
            if how in {"no word", "hung"}:
                self.bad.append(f"{how}: {reason}")


class Client(Thread):
    """Asks one question after the other, in whole or in pieces, until it is told to go."""

    def __init__(self, rig: Rig, number: int, tally: Tally, is_over: Event) -> None:
        super().__init__(daemon=True, name=f"client {number}")
        self._rig, self._tally, self._is_over = rig, tally, is_over
        self._random = Random(SEED * 1000 + number)

    def run(self) -> None:
        while not self._is_over.is_set():
            is_stream, begun_s = self._random.random() < 0.7, time.monotonic()
            body = {
                "model": str(self._rig.model),
                "messages": [{"role": "user", "content": f"Tell me of number {self._random.randrange(10_000)}."}],
                "max_tokens": self._random.randrange(5, 60),
                "stream": is_stream,
            }
            try:
                how, reason = (self._in_pieces if is_stream else self._in_whole)(body)
            except httpx.TimeoutException as error:
                how, reason = "hung", repr(error)
            except httpx.HTTPError as error:
                how, reason = "no word", repr(error)
            took_s = time.monotonic() - begun_s
            self._tally.add("hung" if took_s > ANSWER_S_MAX else how, reason, took_s)
            if how == "refused":
                self._is_over.wait(1)

    def _in_whole(self, body: Any) -> tuple[str, str]:
        url = self._rig.asked.url + "/v1/chat/completions"
        answer = httpx.post(url, json=body, timeout=ANSWER_S_MAX)
        return told_of(answer.status_code, answer.json())

    def _in_pieces(self, body: Any) -> tuple[str, str]:
        last: dict[str, Any] = {}
        is_done = False
        with self._rig.asked.posting("/v1/chat/completions", body, ANSWER_S_MAX) as response:
            if not response.is_success:
                return told_of(response.status_code, json.loads(response.read()))
            for line in response.iter_lines():
                is_done = is_done or line == "data: [DONE]"
                last = json.loads(line[6:]) if line.startswith("data: {") else last
        return told_of(response.status_code, last) if is_done else ("no word", f"no [DONE] after {last}")


def told_of(status: int, value: dict[str, Any]) -> tuple[str, str]:
    """How a request ended by its last object, and the reason if that is not by an answer."""
    if "error" in value:
        message = value["error"]["message"]
        return ("failed" if status == 200 else "refused", message) if message else ("no word", str(value))
    reasons = [choice["finish_reason"] for choice in value.get("choices", [])]
    return ("answered", "") if reasons in [["stop"], ["length"]] else ("no word", str(value))


@dataclass
class Look:
    """At the node that lives, and at all of ours."""

    at_s: float
    resident_bytes: int
    mesh_bytes: int  # of its mesh process, which others come to and go from
    descriptors: int
    threads: int
    processes: int


def look(rig: Rig, begun_s: float) -> Look:
    node = psutil.Process(rig.asked.process.pid)
    with node.oneshot():
        figures = node.memory_info().rss, mesh_bytes(node), node.num_fds(), node.num_threads()
    return Look(time.monotonic() - begun_s, *figures, len(census.ours(rig.home)))


def mesh_bytes(node: psutil.Process) -> int:
    """0 while it is being replaced."""
    for child in node.children():
        with suppress(psutil.Error):
            if any("mesh_process" in part for part in child.cmdline()):
                return child.memory_info().rss
    return 0


class Churn:
    """Does something to one node at a time; what it was is in `told`."""

    def __init__(self, rig: Rig) -> None:
        self._rig, self._random = rig, Random(SEED)
        self.told: Counter[str] = Counter()
        self._mend: Callable[[], None] | None = None

    def strike(self) -> None:
        name = self._random.choice([name for name in NAMES if name != ASKED])
        kind = self._random.choice(["kill", "stop the node of", "stop the machine of"])
        self.told[f"{kind} {name}"] += 1
        node = self._rig.nodes[name]
        if kind == "kill":
            node.process.kill()
            self._mend = lambda: self._rig.restart(name)
            return
        process, *children = census.family(node.process.pid)
        self._rig.stop(process, *(children if "machine" in kind else []))
        self._mend = self._rig.go_on

    def mend(self) -> None:
        if self._mend:
            self._mend()
        self._mend = None


def live_through(rig: Rig, seconds: float) -> tuple[Tally, list[Look], Counter[str]]:
    tally, is_over, churn = Tally(), Event(), Churn(rig)
    clients = [Client(rig, number, tally, is_over) for number in range(SLOTS)]
    for client in clients:
        client.start()
    begun_s, looks = time.monotonic(), list[Look]()
    next_s = begun_s + EVERY_S / 2
    while time.monotonic() - begun_s < seconds:
        wait(rig, begun_s, next_s, looks)
        churn.strike()
        wait(rig, begun_s, time.monotonic() + LASTS_S, looks)
        churn.mend()
        next_s += EVERY_S
    is_over.set()
    for client in clients:
        client.join(ANSWER_S_MAX + 30)
    tally.bad += [f"hung: {client.name}" for client in clients if client.is_alive()]
    return tally, looks, churn.told


def wait(rig: Rig, begun_s: float, until_s: float, looks: list[Look]) -> None:
    """And looks around on the way."""
    while (left_s := until_s - time.monotonic()) > 0:
        with suppress(psutil.NoSuchProcess):
            looks.append(look(rig, begun_s))
        time.sleep(min(LOOK_S, left_s))


def grown(looks: list[Look], what: str) -> float:
    """From the median of the first third to that of the last."""
    third = max(1, len(looks) // 3)
    first, last = ([getattr(each, what) for each in part] for part in (looks[:third], looks[-third:]))
    return median(last) - median(first)


def report(tally: Tally, looks: list[Look], strikes: Counter[str]) -> dict[str, Any]:
    return {
        "seed": SEED,
        "minutes": MINUTES,
        "strikes": dict(strikes),
        "requests": dict(tally.ended),
        "reasons": dict(tally.reasons),
        "answer_median_s": median(tally.took_s),
        "answer_worst_s": max(tally.took_s),
        "node_resident_grown_mib": grown(looks, "resident_bytes") / census.MIB,
        "mesh_resident_grown_mib": grown(looks, "mesh_bytes") / census.MIB,
        "node_descriptors_grown": grown(looks, "descriptors"),
        "node_threads_grown": grown(looks, "threads"),
        "looks": [vars(each) for each in looks[:: max(1, len(looks) // 60)]],
    }


@pytest.mark.faults
def test_churn(tmp_path: Path, demo_model: Path) -> None:
    print(f"FAULTS_SEED={SEED} FAULTS_MINUTES={MINUTES:g}")
    with local(tmp_path, demo_model, "dora") as rig:
        rig.arrange()
        assert rig.asked.ask(str(demo_model), "Hello", max_tokens=4)
        before = census.take(rig.home, rig.process_ids())
        tally, looks, strikes = live_through(rig, MINUTES * 60)
        rig.wait_together()
        rig.wait_serving()
        until(lambda: rig.requests() == 0, SETTLE_S_MAX, "no request is left", rig.told)
        after, leaks = census.settled(before, rig.home, rig.process_ids(), SETTLE_S_MAX)
        left = census.orphans(rig.home, rig.process_ids())
        found = report(tally, looks, strikes) | {"before": before.told(), "after": after.told(), "leaks": leaks}
    print(json.dumps({key: value for key, value in found.items() if key != "looks"}, indent=2))
    if out := os.environ.get("FAULTS_OUT"):
        Path(out).write_text(json.dumps(found, indent=2) + "\n")
    assert tally.bad == []
    assert tally.ended["answered"] > 0
    assert (leaks, left) == ([], [])
    assert found["node_resident_grown_mib"] < GROWN_BYTES_MAX / census.MIB
    assert found["mesh_resident_grown_mib"] < GROWN_BYTES_MAX / census.MIB
    assert found["node_descriptors_grown"] <= DESCRIPTORS_GROWN_MAX
