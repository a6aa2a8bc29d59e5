"""What stops a run: SIGTERM, Ctrl-C, or a spent budget. A training step is finished and saved first."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

from align.errors import CTRL_C, SIGTERM, Stopped, how_to_resume

NAMES = {signal.SIGTERM: SIGTERM, signal.SIGINT: CTRL_C}
AGAIN_S = 0.05  # until a signal is sent again whose exception was discarded
_deferring: list[StopRequest] = []  # of the blocks of `defer_stop` that this process is in


class StopRequest:
    """What asks the process to stop: CTRL_C, SIGTERM or a cap of the budget; None as long as nothing does."""

    by: str | None = None

    @property
    def requested(self) -> bool:
        """Whether the process has been asked to stop."""
        return self.by is not None


class Terminated(KeyboardInterrupt):
    """SIGTERM was received while nothing defers it."""


@contextmanager
def defer_stop(note: Callable[[str], None] = lambda text: None) -> Generator[StopRequest]:
    """Only record what asks to stop within the block; `note` shows the first Ctrl-C, a second one raises at once.

    A process of a launch never raises: the signal may arrive twice, from the terminal or scheduler and from the
    launcher, which ends its processes itself. Outside the main thread, where Python cannot handle signals, the handlers
    are left unchanged; so is that of a signal that is ignored, as in background jobs of a shell.
    """
    stop = StopRequest()

    def record(number: int, _: FrameType | None) -> None:
        is_repeated = stop.by == CTRL_C
        stop.by = stop.by or NAMES[signal.Signals(number)]
        if number == signal.SIGINT and "RANK" not in os.environ:
            if is_repeated:
                raise KeyboardInterrupt
            note("saving a checkpoint after the current optimizer step; press Ctrl-C again to stop immediately")

    _deferring.append(stop)
    try:
        with _handled({number: record for number in NAMES if signal.getsignal(number) != signal.SIG_IGN}):
            yield stop
    finally:
        _deferring.remove(stop)


def stop_run(by: str) -> None:
    """Have the block of `defer_stop` that this process is in stop the run; raise `Stopped` where it is in none."""
    if not _deferring:
        raise Stopped(f"stopped by {by}; {how_to_resume(by)}", by)
    _deferring[-1].by = _deferring[-1].by or by


@contextmanager
def raise_on_sigterm() -> Generator[None]:
    """Raise `Terminated` in the main thread on SIGTERM, as Ctrl-C raises `KeyboardInterrupt`.

    Either signal is sent again where Python discards the exception, as in the callback that each import ends with.
    """
    with _handled({signal.SIGTERM: _terminate}), _sent_again():
        yield


def ignore_sigterm() -> None:
    """Ignore SIGTERM in the rest of the block of `raise_on_sigterm` that this process is in, if it is in one."""
    if signal.getsignal(signal.SIGTERM) is _terminate:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _terminate(number: int, frame: FrameType | None) -> None:
    ignore_sigterm()  # a second one must not interrupt the ending
    raise Terminated


@contextmanager
def _sent_again() -> Generator[None]:
    """Send SIGTERM or SIGINT again in this block if its exception was discarded."""
    before = sys.unraisablehook

    def send_again(discarded: sys.UnraisableHookArgs) -> None:
        if not issubclass(discarded.exc_type, KeyboardInterrupt):
            before(discarded)
            return
        number = signal.SIGINT
        if issubclass(discarded.exc_type, Terminated):
            number = signal.SIGTERM
            signal.signal(number, _terminate)
        again = threading.Timer(AGAIN_S, os.kill, (os.getpid(), number))  # after the callback
        again.daemon = True
        again.start()

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextmanager
def _handled(handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]]) -> Generator[None]:
    """Install signal handlers in this block, if it runs in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
