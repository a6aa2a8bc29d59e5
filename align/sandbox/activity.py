"""How long a process has worked rather than slept, to distinguish a slow machine from a program that sleeps."""

from __future__ import annotations

import os
import time
from pathlib import Path

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")  # per second, of the CPU times in /proc


class Activity:
    """The time for which a process has run on a core or waited for one."""

    def __init__(self) -> None:
        self._delay_ns: dict[str, int] = {}  # by thread: a thread that has ended is no longer listed
        self._last_s: float | None = None

    def update(self, process: int) -> float | None:
        """Return the time in seconds; once the process has ended, the last known one."""
        folder = Path(f"/proc/{process}")
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            for thread in (folder / "task").iterdir():
                self._delay_ns[thread.name] = int((thread / "schedstat").read_text().split()[1])
        except (
            FileNotFoundError,
            ProcessLookupError,
        ):  # the process or a thread has ended, or the kernel lacks the file
            return self._last_s
        cpu_s = (int(fields[11]) + int(fields[12])) / CLOCK_TICKS
        self._last_s = cpu_s + sum(self._delay_ns.values()) / 1e9
        return self._last_s


class IdleTime:
    """The elapsed time in which neither of two processes was at work, since both have been known."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._start: float | None = None  # the time, less the activity until then

    def exceeds_limit(self, *active_s: float | None) -> bool:
        """Return whether it exceeds the limit; False where the activity of a process is not known."""
        known = [seconds for seconds in active_s if seconds is not None]
        if len(known) < len(active_s):
            return False
        idle_since_boot = time.monotonic() - sum(known)
        if self._start is None:
            self._start = idle_since_boot
        return idle_since_boot - self._start > self._limit_s
