"""Being told to stop: SIGTERM, as schedulers, clouds and `kill` send it, waits until what is done can be kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager


class Stop:
    """What a block knows of the signal."""

    told = False


@contextmanager
def stop_later() -> Generator[Stop]:
    """A block in which SIGTERM is only remembered; it may come twice, from the scheduler and from the launcher."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # where Python hears of no signal
        yield stop
        return

    def remember(*_: object) -> None:
        stop.told = True

    before = signal.signal(signal.SIGTERM, remember)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
