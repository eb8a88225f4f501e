"""Where one of a stage's two links goes, whichever side dialled."""

import threading
from collections.abc import Callable

from covey.engine.link import Link


class LinkPlace:
    """Holds one link, the first that comes. For any number of threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._link: Link | None = None

    def fill(self, make: Callable[[], Link]) -> bool:
        """False if there is a link already; else the one that `make` opens is it. Whoever comes meanwhile waits.

        Raises what `make` raises; the place is empty then.
        """
        with self._changed:
            if self._link is not None:
                return False
            self._link = make()
            self._changed.notify_all()
            return True

    def wait(self, seconds: float) -> Link | None:
        """The link, or None if there is none by then."""
        with self._changed:
            self._changed.wait_for(lambda: self._link is not None, max(seconds, 0.0))
            return self._link
