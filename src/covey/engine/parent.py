"""The end of the node ends a process that it started, also one that stands still and can't see the end of its input."""

import ctypes
import logging
import signal
import sys
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
