"""Where one of a stage's two links goes, whichever side dialled."""

import threading
from collections.abc import Callable

from covey.engine.link import Link


class LinkPlace:
    """Holds one link, the first that comes, until it is closed. For any number of threads."""

    def __init__(self) -> None:
        self._filling = threading.Lock()
        self._changed = threading.Condition()
        self._link: Link | None = None
        self.is_closed = False

    def fill(self, make: Callable[[], Link]) -> bool:
        """False if it is closed or there is a link already; else the one that `make` opens is it. Whoever comes
        meanwhile waits.

        Raises what `make` raises; the place is empty then.
        """
        with self._filling:
            return self._is_free and self._take(make())

    @property
    def _is_free(self) -> bool:
        with self._changed:
            return self._link is None and not self.is_closed

    def _take(self, link: Link) -> bool:
        with self._changed:
            if self.is_closed:
                link.close()
                return False
            self._link = link
            self._changed.notify_all()
            return True

    def wait(self, seconds: float | None) -> Link | None:
        """The link, or None if there is none by then, or the place is closed. None: for as long as that takes."""
        limit = None if seconds is None else max(seconds, 0.0)
        with self._changed:
            self._changed.wait_for(lambda: self.is_closed or self._link is not None, limit)
            return self._link

    def settle(self) -> Link | None:
        """The link, once nobody is about to fill the place."""
        with self._filling:
            return self.wait(0)

    def close(self) -> None:
        """Closes the link, and takes no other. Waits for nobody who is about to fill it."""
        with self._changed:
            self.is_closed = True
            if self._link:
                self._link.close()
                self._link = None
            self._changed.notify_all()
