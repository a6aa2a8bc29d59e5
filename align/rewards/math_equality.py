"""Whether two mathematical texts are equal, by math-verify, in a process of its own and in bounded time.

math-verify bounds itself by signals: that works in the main thread only, on POSIX only, and not inside one long
operation on integers, as in `9^{9^{9^9}}`. A process can be ended at any time. It serves many pairs (`math_worker`),
since its imports take a second.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread

from align.errors import RunError

COMPARISON_S = 5.0  # math-verify's own limit for one comparison
START_S = 120.0  # its imports; many starts at once on a busy machine are slow
SIDE = Path(__file__).with_name("math_worker.py")


@lru_cache(maxsize=65536)  # the responses to one prompt often give the same answer
def equal_maths(given: str, expected: str) -> bool | None:
    """Whether math-verify finds both equal, each read as LaTeX; None where it has not found out within its limits."""
    return _service(given, expected)


class _Process:
    """One process that compares; it ends with its standard input."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(SIDE), str(round(2 * COMPARISON_S))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self._answers: SimpleQueue[str] = SimpleQueue()
        Thread(target=self._listen, daemon=True).start()
        if self._answer(START_S) != "ready":
            self.end()
            raise RunError(f"math-verify cannot be imported, or not within {START_S:.0f} s")

    def _listen(self) -> None:
        assert self._process.stdout
        with self._process.stdout as lines:
            for line in lines:
                self._answers.put(line.strip())
        self._answers.put("ended")

    def _answer(self, limit_s: float) -> str:
        try:
            return self._answers.get(timeout=limit_s)
        except Empty:
            return "late"

    def ask(self, given: str, expected: str) -> str:
        """`true`, `false`, or what has happened to the process instead."""
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps([given, expected]) + "\n")
            self._process.stdin.flush()
        except OSError:
            return "ended"
        return self._answer(COMPARISON_S)

    def end(self) -> None:
        """Kill it, whatever it is doing."""
        assert self._process.stdin
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):  # what was not written goes nowhere
            self._process.stdin.close()


class _Service:
    """The process that compares, started when it is first needed and again after it was ended."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: _Process | None = None
        atexit.register(self.end)

    def __call__(self, given: str, expected: str) -> bool | None:
        with self._lock:
            self._process = self._process or _Process()
            answer = self._process.ask(given, expected)
            if answer not in ("true", "false"):
                self._process.end()
                self._process = None
                return None
        return answer == "true"

    def end(self) -> None:
        if self._process:
            self._process.end()
            self._process = None


_service = _Service()
