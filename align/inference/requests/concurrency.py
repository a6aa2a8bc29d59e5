"""How many requests a server gets at a time: fewer where it is overloaded, more while it answers."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager

from align.inference.requests.retries import TransientError

LEAST = 1.0
SHARE = 0.5  # of the limit that is left after an overload


class ConcurrencyLimit:
    """Additive increase, multiplicative decrease (Chiu and Jain 1989), shared by the threads that send requests.

    The limit starts at `most`. An overloaded answer (`TransientError.is_overload`) halves it, but not again for
    requests that were sent before. Every answer then adds the reciprocal of the limit: about one for each round of
    requests.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = float(most)
        self._active = 0
        self._times_halved = 0
        self._changed = threading.Condition()

    @contextmanager
    def slot(self, stopped: threading.Event) -> Generator[None]:
        """Wait until a request may be sent, and hold its place in this block.

        Raises `TransientError` in place of sending once `stopped` is set.
        """
        with self._changed:
            while self._active >= int(self.limit):
                self._changed.wait()
            self._active += 1
            before = self._times_halved
        try:
            if stopped.is_set():
                raise TransientError("stopped")
            yield
        except TransientError as error:
            if error.is_overload:
                self._halve(before)
            raise
        else:
            with self._changed:
                self.limit = min(self.most, self.limit + 1 / self.limit)
        finally:
            with self._changed:
                self._active -= 1
                self._changed.notify_all()

    def _halve(self, before: int) -> None:
        with self._changed:
            if self._times_halved == before:
                self._times_halved += 1
                self.limit = max(LEAST, self.limit * SHARE)
