"""The end of standard input, by which a program that started this one tells that it is gone, even if it was killed."""

import os
import sys
from contextlib import suppress
from typing import Final

import anyio

CHUNK_BYTES: Final = 4096


async def wait_input_closed() -> None:
    """Returns at the end of standard input; what comes before it is dropped. A file or no input at all ends at once."""
    while sys.stdin is not None:
        with suppress(PermissionError):  # Linux watches no plain file and no null device: reading them never waits
            await anyio.wait_readable(sys.stdin)
        if not os.read(sys.stdin.fileno(), CHUNK_BYTES):
            return
