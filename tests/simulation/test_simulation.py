"""The control plane in its seeded world: 200 seeds on every run, the same digest twice, and planted bugs are found."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from covey.control.cluster import Cluster, Decision
from covey.control.commands import Asking
from covey.control.downloads import Downloads
from covey.control.leadership import Leadership
from covey.control.replication import Replication
from covey.control.runners import Runners
from covey.control.tending import Tending
from covey.schema.cluster import Accepted
from covey.schema.ids import InstanceId
from simulation.run import run_seed

ROOT = Path(__file__).resolve().parent.parent.parent
SEEDS = 200


def test_seeds_pass() -> None:
    failures = [verdict.line() for seed in range(SEEDS) if (verdict := run_seed(seed)).sentence]
    assert failures == []


def digest(seed: int, hash_seed: str) -> str:
    command = [sys.executable, "-c", f"from simulation.run import run_seed; print(run_seed({seed}).digest)"]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()


@pytest.mark.parametrize("seed", [3, 17])
def test_a_run_does_not_depend_on_hash_order(seed: int) -> None:
    assert digest(seed, "0") == digest(seed, "1") == run_seed(seed).digest


def test_different_seeds_do_different_things() -> None:
    assert run_seed(1).digest != run_seed(2).digest


BUGS: dict[str, tuple[type, str, Any]] = {
    "maps are never compared": (Replication, "compare", lambda *_: []),
    "a deletion is forgotten": (
        Cluster,
        "_decide_deletion",
        lambda *_: Decision((), Accepted(InstanceId("gone"))),
    ),
    "runners outlive their instance": (Runners, "_assign", lambda *_: None),
    "two are started at once": (Runners, "_must_stop", lambda *_: False),
    "a lost node's instances stay": (Tending, "mend", lambda *_: ()),
    "failed fetches are forgotten": (Downloads, "fail", lambda *_: None),
    "answers get lost": (Asking, "answer", lambda *_: []),
    "nobody leads after the leader": (Leadership, "_claim_if_due", lambda *_: None),
}


@pytest.mark.parametrize("name", sorted(BUGS))
def test_a_planted_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, method, broken = BUGS[name]
    assert hasattr(owner, method)
    monkeypatch.setattr(owner, method, broken)
    assert any(run_seed(seed).sentence for seed in range(SEEDS))
