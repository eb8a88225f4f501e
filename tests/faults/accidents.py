"""Accidents inside of a process that no signal can bring about: a module that Python imports by itself at every start.

It lies in a folder of the test, and reaches our processes by `PYTHONPATH`; the product knows nothing of it. Files
beside it decide what happens, so that a test can begin and end it.
"""

from pathlib import Path

import pytest

MODULE = '''
import os, sys, time
from pathlib import Path

folder = Path(__file__).parent
is_runner = "covey.engine" in sys.orig_argv

if is_runner and (folder / "library-is-missing").exists():
    sys.stderr.write("libcompute.so.1: cannot open shared object file\\n")
    sys.stderr.flush()
    os._exit(3)

if is_runner and (folder / "disk-hangs").exists():
    opened = []

    def hang(event, arguments):
        """The second time that the model is opened, for its weights: what was taken until then is held."""
        if event == "open" and str(arguments[0]).endswith(".gguf"):
            opened.append(1)
            if len(opened) == 2:
                opened.append(bytearray(os.urandom(1) * (200 << 20)))
                time.sleep(3600)

    sys.addaudithook(hang)

if (folder / "clock").exists():
    right, right_ns = time.time, time.time_ns

    def ahead():
        """Seconds."""
        return int((folder / "clock").read_text() or 0)

    time.time = lambda: right() + ahead()
    time.time_ns = lambda: right_ns() + ahead() * 1_000_000_000
'''


class Accidents:
    """Each of them is on while its file is there; the clock is wrong by what its file says, from a start with it on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begin(self, name: str, content: str = "") -> None:
        fresh = self._folder / f".{name}"
        fresh.write_text(content)
        fresh.replace(self._folder / name)

    def end(self, name: str) -> None:
        (self._folder / name).unlink()


def prepared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Accidents:
    """For all processes that are started from now on."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return Accidents(folder)
