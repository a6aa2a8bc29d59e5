"""The worker of `math_equality`: it reads pairs of texts and answers whether math-verify finds them equal."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import warnings

from align.sandbox import framing

READY = "ready"
MEMORY_BYTES = 4 << 30


def serve(limit_s: float) -> None:
    """Answer pairs from standard input on standard output until the input ends.

    A pair that takes more than `limit_s` seconds of processor time ends the process; Windows has no such timer.
    """
    logging.disable()  # math-verify warns that its own limits are off
    warnings.simplefilter("ignore")
    from math_verify import parse, verify  # noqa: PLC0415 - after logging is off

    _limit_memory()
    answers = sys.stdout.fileno()
    sys.stdout = sys.stderr  # nothing else may write to the pipe
    framing.write(answers, framing.pack_json(READY))
    while True:
        try:
            texts = framing.read_json(sys.stdin.fileno())
        except EOFError:
            return
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_PROF, limit_s)
        given, expected = (parse(f"${text}$", parsing_timeout=0) for text in texts)
        framing.write(answers, framing.pack_json(bool(verify(expected, given, timeout_seconds=0))))
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_memory() -> None:
    """Limit the memory of a comparison, where the system has such limits."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has none, and macOS may refuse this one
        import resource  # noqa: PLC0415 - does not exist on Windows

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
