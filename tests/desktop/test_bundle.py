"""Covey.app: what macOS reads in it, and that its script starts the covey of today with what it was given."""

import os
import plistlib
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from covey.desktop.bundle import BundleError, write_bundle

TOLD = '#!/bin/sh\nfor each in "$0" "$@"; do printf "%s\\n" "$each"; done\n'
ODD = ["up", "--name", "my Mac's $HOME", "", "*"]


def program(path: Path, text: str = TOLD) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def start(bundle: Path, path: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = bundle / "Contents" / "MacOS" / "covey"
    return subprocess.run(
        [script, *arguments], env={"PATH": path}, capture_output=True, text=True, timeout=30, check=False
    )


def test_what_macos_reads(tmp_path: Path) -> None:
    info = plistlib.loads((write_bundle(tmp_path, ["/x/python"], "1.2.3") / "Contents" / "Info.plist").read_bytes())
    assert "other devices" in info["NSLocalNetworkUsageDescription"]
    assert info["NSBonjourServices"] == []  # none is used, so none is named
    assert info["LSUIElement"] is True
    assert info["CFBundlePackageType"] == "APPL"
    assert info["CFBundleShortVersionString"] == "1.2.3"
    assert (tmp_path / "Covey.app" / "Contents" / "MacOS" / info["CFBundleExecutable"]).exists()


def test_it_is_the_same_each_time_and_for_everybody(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        bundle = write_bundle(tmp_path, ["/x/python", "-m", "covey.cli"], "1")
    finally:
        os.umask(before)
    first = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    assert {str(path.relative_to(bundle)) for path in first} == {"Contents/Info.plist", "Contents/MacOS/covey"}
    write_bundle(tmp_path, ["/x/python", "-m", "covey.cli"], "1")
    assert {path: path.read_bytes() for path in first} == first
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [bundle, *bundle.rglob("*")]}
    assert modes == {"Covey.app": 0o755, "Contents": 0o755, "MacOS": 0o755, "Info.plist": 0o644, "covey": 0o755}


def test_the_covey_on_path_is_started_with_all_arguments(tmp_path: Path) -> None:
    """It was installed anew since: the bundle holds no copy that could be old."""
    bundle = write_bundle(tmp_path / "my apps", [str(program(tmp_path / "old" / "python")), "-m", "covey.cli"], "1")
    covey = program(tmp_path / "new bin" / "covey")
    assert start(bundle, f"{covey.parent}:/usr/bin:/bin", *ODD).stdout.splitlines() == [str(covey), *ODD]


def test_without_one_it_is_the_covey_that_made_the_bundle(tmp_path: Path) -> None:
    """As from the Finder, whose PATH names the system's folders alone."""
    python = program(tmp_path / "a 'venv'" / "python")
    bundle = write_bundle(tmp_path, [str(python), "-m", "covey.cli"], "1")
    assert start(bundle, "/usr/bin:/bin", *ODD).stdout.splitlines() == [str(python), "-m", "covey.cli", *ODD]
    assert start(bundle, "/usr/bin:/bin").stdout.splitlines() == [str(python), "-m", "covey.cli", "up"]


def test_a_bundle_on_path_does_not_start_itself_for_ever(tmp_path: Path) -> None:
    python = program(tmp_path / "python")
    bundle = write_bundle(tmp_path, [str(python)], "1")
    path = f"{bundle / 'Contents' / 'MacOS'}:/usr/bin:/bin"
    assert start(bundle, path, "ps").stdout.splitlines() == [str(python), "ps"]


def test_where_there_is_none_a_sentence_says_so_on_the_screen_too(tmp_path: Path) -> None:
    program(tmp_path / "bin" / "osascript")
    bundle = write_bundle(tmp_path, ["/gone/python"], "1")
    done = start(bundle, f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert done.returncode == 1
    assert done.stderr.startswith("covey is not found")
    assert len(done.stderr.splitlines()) == 1


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "Covey.app" / "Contents" / "Info.plist"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("<plist>")
    with pytest.raises(BundleError, match="is not ours"):
        write_bundle(tmp_path, ["/x"], "1")
    assert foreign.read_text() == "<plist>"


def test_a_folder_that_can_not_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match=r"can't be written \(.*choose another folder with --output$"):
        write_bundle(tmp_path / "file", ["/x"], "1")


def test_the_command_makes_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "covey.cli", "launcher", "--output", "a b"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.splitlines()[0] == f"{tmp_path}/a b/Covey.app is made."
    assert ("It is for macOS" in done.stdout) == (sys.platform != "darwin")
    shown = start(tmp_path / "a b" / "Covey.app", "/usr/bin:/bin", "--version").stdout
    assert shown.startswith("covey ")
