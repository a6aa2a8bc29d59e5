"""The process that compares for `equality`: it reads pairs of texts and says whether math-verify finds them equal.

It is run as a file and imports nothing of this package.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
import warnings

MEMORY_BYTES = 4 << 30


def _limit_memory() -> None:
    """As much memory as a comparison may take, where the system has such limits."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has none, and macOS may refuse this one
        import resource  # noqa: PLC0415 - not there on Windows

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def _serve(limit_s: int) -> None:
    """Answer pairs from standard input, a JSON line each, until it ends."""
    logging.disable()  # math-verify warns that its own limits are off
    warnings.simplefilter("ignore")
    from math_verify import parse, verify  # noqa: PLC0415 - after logging is off

    _limit_memory()
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing else may speak on this line
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        if sys.platform != "win32":
            signal.alarm(limit_s)  # ends this process, where the one that asks is no longer there to do so
        given, expected = (parse(f"${text}$", parsing_timeout=0) for text in json.loads(line))
        print(json.dumps(verify(expected, given, timeout_seconds=0)), file=answers, flush=True)
        if sys.platform != "win32":
            signal.alarm(0)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
