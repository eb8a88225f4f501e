"""The control plane in its seeded world: 200 seeds on every run, and the same digest twice."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
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
