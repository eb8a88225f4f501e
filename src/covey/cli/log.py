"""What `covey up` writes while it runs: the greeting, then a line with the time for each thing that happens.

What is wrong goes to standard error, where the libraries' warnings go, too.
"""

import logging
import os
import sys
from collections.abc import Callable

from covey.cli.chat import write
from covey.cli.console import out
from covey.cli.welcome import TIME_FORMAT, news, welcome
from covey.node import NodeReady
from covey.schema.activity import ActivityEvent
from covey.schema.ids import NodeId


class Log:
    """Of one node. `how_to_join` is asked for its greeting: by then there is a join code."""

    def __init__(self, how_to_join: Callable[[], str], *, is_quiet: bool) -> None:
        self._how_to_join = how_to_join
        self._is_quiet = is_quiet
        self._own_id = NodeId("")
        logging.basicConfig(format="%(asctime)s  %(message)s", datefmt=TIME_FORMAT)

    def announce(self, ready: NodeReady) -> None:
        self._own_id = ready.node_id
        out.print(f"{welcome(ready, self._how_to_join())}\n", soft_wrap=True)

    def tell(self, event: ActivityEvent) -> None:
        line = "" if self._is_quiet else news(event, self._own_id)
        try:
            write(line)
        except OSError:  # whoever read has gone, and the node serves on
            self._is_quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
