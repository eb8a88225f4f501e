"""The control plane in its seeded world: 300 seeds on every run, the same digest twice, and planted bugs are found.

A bug that this simulator can't find is worth more than one that it can: whoever meets one adds an invariant, and
plants the bug here.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from covey.control import cluster, runners, tending
from covey.control.cluster import Cluster
from covey.control.commands import Answering, Asking
from covey.control.deciding import Deciding
from covey.control.downloads import Downloads
from covey.control.keeping import Keeping
from covey.control.leadership import Leadership
from covey.control.machine import Machine
from covey.control.membership import Membership
from covey.control.placement.place import Options
from covey.control.replication import Replication
from covey.control.runner_table import Runner
from covey.control.runners import Runners
from covey.control.view import View
from covey.schema.cluster import IntentUpdate
from covey.schema.machine import SendTo
from simulation.run import run, run_all

ROOT = Path(__file__).resolve().parent.parent.parent
SEEDS = 300
ONCE_HEARD = Membership._hear


def test_seeds_pass() -> None:
    verdicts = list(run_all(range(1, SEEDS + 1)))
    assert [verdict.line() for verdict in verdicts if verdict.problem] == []
    assert sum(verdict.step_count for verdict in verdicts) > 50_000  # the worlds are not empty


def digest(seed: int, hash_seed: str) -> str:
    command = [sys.executable, "-m", "simulation", "--seed", str(seed)]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.splitlines()[0]


@pytest.mark.parametrize("seed", [3, 17, 61])
def test_a_run_does_not_depend_on_the_order_of_hashes(seed: int) -> None:
    assert digest(seed, "0") == digest(seed, "1") == run(seed).line()


def test_different_seeds_do_different_things() -> None:
    assert run(1).digest != run(2).digest


def never(*_: Any) -> bool:
    return False


def nothing(*_: Any) -> list[object]:
    return []


def take_every_report(self: Membership, now_ms: int, report: Any) -> None:
    peer, _ = self._hear(now_ms, report.node_id, (report.boot, report.sequence))
    peer.report = report
    self.revision += 1


def hear_is_seen(self: Membership, now_ms: int, node_id: Any) -> bool:
    return node_id == self.node_id or node_id in self.hears(now_ms)


def lead_whatever_others_claim(self: Leadership, now_ms: int) -> None:
    self._follow(now_ms, self.claim or self._highest_claim(now_ms) or self._claim_if_due(now_ms))


def retry_a_fetch_at_once(self: Downloads, now_ms: int, news: Any) -> None:
    download = self._current(news.model_id, news.attempt)
    if download:
        download.phase, download.due_ms = type(download.phase)("waiting"), now_ms


def take_anything_for_a_sign_of_life(self: Membership, now_ms: int, node_id: Any, moment: Any) -> Any:
    heard = ONCE_HEARD(self, now_ms, node_id, moment)
    heard[0].heard_ms = now_ms
    return heard


def let_go_and_forget(self: Membership, heartbeat: Any) -> None:
    self.peers.pop(heartbeat.node_id, None)


def any_nodes(wish: Any, _: Any) -> Options:
    return Options(context_length=wish.context_length, slot_count=wish.slot_count)


def accept_before_the_disk(self: Deciding, request: Any, outcome: Any, decided: Any) -> list[object]:
    effect = self.keeping.write(decided)
    self.replication.take_kept(0, decided)
    self.conclude(request, replace(outcome, on_one_node_only=True))
    return [effect]


def give_a_write_up(self: Keeping, *_: object) -> None:
    self.under_way = None


def start_with_nothing(self: Machine, now_ms: int, _: Any) -> list[object]:
    self.view.listening_since_ms = self._heartbeat_due_ms = now_ms
    return []


def confirm_at_once(_: Keeping, message: Any) -> list[object]:
    return [SendTo(message.target, message)]


def accept_what_failed(self: Deciding, news: Any) -> None:
    for promise in self._written_by(news.token):
        del self.promises[promise.request.command_id]
        self.replication.take_kept(0, promise.entries)
        self.conclude(promise.request, replace(promise.outcome, on_one_node_only=True))


def all_that_is_assigned(self: View, _: int) -> dict[Any, Any]:
    return dict(self.cluster.instances)


def begin_anew(self: Runners, given: Any, stage: Any, _: Any) -> Runner:
    budget = len(self.settings.runner_back_off_ms)
    return Runner(given, stage, self.settings.limits.shut_down_ms // 2, retries_left=budget)


def wait_for_ever(_: Runners, runner: Any, __: Any, ___: Any) -> bool:
    runner.waiting = runner.waiting or "has too little memory"
    return False


def claim_two_disks(self: Deciding, promise: Any, **_: bool) -> None:
    del self.promises[promise.request.command_id]
    self.conclude(promise.request, promise.outcome)


def try_again_at_once(self: Keeping, _: int, token: int, __: str) -> None:
    if self.under_way is not None and token == self.token:
        self.under_way, self.unkept = None, {**self.under_way, **self.unkept}


def send_a_map_for_every_heartbeat(self: Replication, _: int, heartbeat: Any) -> list[object]:
    is_same = heartbeat.intent_digest == self.cluster.digest
    return [] if is_same else [SendTo(heartbeat.node_id, IntentUpdate(self.node_id, self.cluster.entries))]


def everybody(self: Membership, _: int) -> list[Any]:
    return list(self.peers.values())


BUGS: dict[str, tuple[tuple[Any, str, Any], ...]] = {
    "an old report replaces a newer one": ((Membership, "hear_report", take_every_report),),
    "who is heard counts as visible": ((Membership, "is_visible", hear_is_seen),),
    "the map that came last wins": ((cluster, "is_newer", lambda entry, known: entry != known),),
    "maps are never compared": ((Replication, "compare", nothing),),
    "a leader never steps down": ((Leadership, "advance", lead_whatever_others_claim),),
    "a repeated command is carried out again": (
        (Cluster, "_done_before", lambda *_: None),
        (Answering, "remember", lambda *_: None),
    ),
    "a command waits for ever": ((Asking, "expire", nothing),),
    "instances of forgotten nodes stay": ((View, "gone", nothing),),
    "a failed fetch is tried again at once": ((Downloads, "fail", retry_a_fetch_at_once),),
    "what was long under way counts as a sign of life": ((Membership, "_hear", take_anything_for_a_sign_of_life),),
    "a choice of nodes is forgotten": ((tending, "options_of", any_nodes),),
    "what a node said before it left brings it back": ((Membership, "_let_go", let_go_and_forget),),
    "a process that hangs is left alone": ((runners, "overdue", lambda *_: None),),
    "runners outlive their instance": ((Runners, "_must_stop", never),),
    "a command is accepted before it is on disk": ((Deciding, "promise", accept_before_the_disk),),
    "a command is accepted although the disk is full": ((Deciding, "hear_failed", accept_what_failed),),
    "a write that failed is not tried again": ((Keeping, "hear_failed", give_a_write_up),),
    "a node starts without what it kept": ((Machine, "_on_started", start_with_nothing),),
    "a copy is confirmed before it is on disk": ((Keeping, "owe", confirm_at_once),),
    "what came during a write goes to disk after what is newer": ((Keeping, "settle", nothing),),
    "what is dormant runs": ((View, "active", all_that_is_assigned),),
    "what is dormant is dropped": ((tending, "DORMANT_MAX", 0),),
    "a runner whose instance was dormant begins anew": ((Runners, "_record", begin_anew),),
    "a runner starts without looking at the memory": ((Runners, "_has_room", lambda *_: True),),
    "a runner that lacks memory waits for ever": ((Runners, "_has_room", wait_for_ever),),
    "while one waits for memory the others run on": ((runners, "is_given_up", never),),
    "a copy is claimed that nobody confirmed": ((Deciding, "_fulfil", claim_two_disks),),
    "a full disk is written to again and again": ((Keeping, "hear_failed", try_again_at_once),),
    "a map goes out for every heartbeat": ((Replication, "compare", send_a_map_for_every_heartbeat),),
    "nodes that are away get assignments": ((Membership, "company", everybody),),
    "deletions are remembered for ever": ((Cluster, "_to_forget", nothing),),
}


RARE = (  # found, but only after some dozens of seeds: `make seeds` looks for these
    "a choice of nodes is forgotten",
    "a runner starts without looking at the memory",
    "a write that failed is not tried again",
    "deletions are remembered for ever",
    "what came during a write goes to disk after what is newer",
    "what is dormant is dropped",
    "while one waits for memory the others run on",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.seeds] if name in RARE else []) for name in sorted(BUGS)]
)
def test_a_planted_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, attribute, broken in BUGS[name]:
        assert hasattr(owner, attribute)
        monkeypatch.setattr(owner, attribute, broken)
    assert any(run(seed).problem for seed in range(1, SEEDS + 1))


def test_a_verdict_tells_how_to_see_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replication, "compare", nothing)
    verdict = next(verdict for seed in range(1, 60) if (verdict := run(seed)).problem)
    assert verdict.line() == (
        f"seed {verdict.seed}: FAILED at step {verdict.step_count} (t={verdict.now_ms / 1000:.1f} s): "
        f"{verdict.problem}; reproduce: python -m simulation --seed {verdict.seed} --trace"
    )
