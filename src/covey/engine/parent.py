"""The end of the node ends a process that it started, also one that stands still and can't see the end of its input.

`python -m covey.engine.parent PROGRAM ARGUMENTS` becomes a program that is not ours, and so ends too.
"""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final

PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h

log = logging.getLogger(__name__)


def end_with_parent() -> None:
    """Asks the kernel for SIGKILL once the thread that started this process has ended, which is the node's main one.

    Linux alone knows this (prctl(2)); elsewhere the node's next life ends what this one left.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        log.warning("the kernel will not end this process with its node (error %d)", ctypes.get_errno())


def ending_with_parent(command: Sequence[str]) -> list[str]:
    """The command line by which another program, of an absolute path, ends with the process that starts it."""
    return [sys.executable, "-P", "-m", "covey.engine.parent", *command]


if __name__ == "__main__":
    end_with_parent()
    os.execv(sys.argv[1], sys.argv[1:])  # noqa: S606 (the program that was named)
