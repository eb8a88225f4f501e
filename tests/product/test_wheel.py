"""The wheel works outside the checkout: installed into a fresh environment, the demo runs from there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `covey` command of a fresh environment into which the wheel and the locked dependencies went."""
    folder = tmp_path_factory.mktemp("wheel")
    uv = shutil.which("uv", path=str(Path(sys.executable).parent))
    assert uv is not None, "uv is installed by the Makefile"
    run(uv, "build", "--quiet", "--no-build-isolation", "--wheel", "--out-dir", folder, cwd=ROOT)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    python = folder / "env" / "bin" / "python"
    install = [uv, "pip", "install", "--quiet", "--python", python]
    run(*install, "--require-hashes", "-r", ROOT / "requirements" / "runtime.txt", cwd=folder)
    run(*install, "--no-deps", *folder.glob("*.whl"), cwd=folder)
    return folder / "env" / "bin" / "covey"


def test_the_demo_runs_from_the_wheel(installed: Path, tmp_path: Path, demo_model: Path) -> None:
    from covey.checkpoints import catalogue

    card = catalogue.find("SmolLM2-135M-Instruct")
    assert card is not None
    target = tmp_path / "models" / catalogue.file_name(card.source)
    target.parent.mkdir(parents=True)
    target.symlink_to(demo_model)
    options = ["--nodes", "2", "--once", "--json", "--temperature", "0", "--max-tokens", "16"]
    output = run(installed, "demo", *options, cwd=tmp_path, COVEY_HOME=str(tmp_path), PYTHONPATH="")
    assert "Paris" in json.loads(output)["text"]
