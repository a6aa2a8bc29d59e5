"""Compare mathematical texts by math-verify, in a separate process and in limited time.

math-verify limits itself by signals: these work in the main thread only, on POSIX only, and not inside one long
operation on integers, as in `9^{9^{9^9}}`. A process can be killed at any time, on POSIX by a timer of processor time,
so that a busy machine changes no verdict. One process serves many comparisons (`math_worker`), because its imports take
a second.
"""

from __future__ import annotations

import atexit
import contextlib
import subprocess
import sys
from functools import lru_cache
from queue import Empty, SimpleQueue
from threading import Lock, Thread

from align.errors import RunError
from align.rewards.answers.math_worker import READY
from align.sandbox import framing
from align.sandbox.process import PROJECT

COMPARISON_S = 5.0  # math-verify's own limit for one comparison
START_S = 120.0  # for its imports: many starts at a time on a busy machine are slow
WAIT_S = COMPARISON_S if sys.platform == "win32" else START_S  # for an answer; on POSIX the worker ends itself
PROGRAM = (
    f"import sys; sys.path.append({PROJECT!r}); from align.rewards.answers.math_worker import serve; "
    f"serve({COMPARISON_S})"
)


@lru_cache(maxsize=65536)  # the responses to one prompt often give the same answer
def equal_maths(given: str, expected: str) -> bool | None:
    """Return whether math-verify finds two LaTeX texts equal; None if it exceeds its time or memory."""
    return _service(given, expected)


class _Worker:
    """One process that compares. It ends with its standard input."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self._answers: SimpleQueue[object] = SimpleQueue()
        Thread(target=self._listen, daemon=True).start()  # a pipe has no timeout on Windows
        if self._answer(START_S) != READY:
            self.kill()
            raise RunError(f"math-verify cannot be imported, or not within {START_S:.0f} s")

    def _listen(self) -> None:
        assert self._process.stdout
        with self._process.stdout as answers, contextlib.suppress(EOFError, framing.InvalidFrame):
            while True:
                self._answers.put(framing.read_json(answers.fileno()))
        self._answers.put(None)

    def _answer(self, limit_s: float) -> object:
        try:
            return self._answers.get(timeout=limit_s)
        except Empty:
            return None

    def compare(self, given: str, expected: str) -> object:
        """Return True or False, None if the worker has ended or exceeds its time."""
        assert self._process.stdin
        try:
            framing.write(self._process.stdin.fileno(), framing.pack_json([given, expected]))
        except OSError:
            return None
        return self._answer(WAIT_S)

    def kill(self) -> None:
        """Kill the process, whatever it is doing."""
        assert self._process.stdin
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()


class _Service:
    """The worker, started by the first comparison and restarted after it was killed."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._worker: _Worker | None = None
        atexit.register(self.stop)

    def __call__(self, given: str, expected: str) -> bool | None:
        with self._lock:
            self._worker = self._worker or _Worker()
            answer = self._worker.compare(given, expected)
            if isinstance(answer, bool):
                return answer
            self.stop()
        return None

    def stop(self) -> None:
        """Kill the worker, if there is one."""
        if self._worker:
            self._worker.kill()
            self._worker = None


_service = _Service()
