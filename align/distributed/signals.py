"""SIGTERM, as schedulers, clouds and `kill` send it, deferred until the work done so far is saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager


class StopRequest:
    """Whether SIGTERM has been received."""

    requested = False


@contextmanager
def defer_sigterm() -> Generator[StopRequest]:
    """Only record SIGTERM within the block. It may arrive twice, from the scheduler and from the launcher.

    Outside the main thread, where Python cannot handle signals, the handler is left unchanged.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def record(*_: object) -> None:
        stop.requested = True

    before = signal.signal(signal.SIGTERM, record)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
