"""`align` that waits to be killed or stopped once it has come so far, however late a test is that does so.

python held.py items NUMBER COMMAND... once a journal of the process has so many items
python held.py steps NUMBER FILE COMMAND... after so many optimizer steps, as long as the file exists
"""

import signal
import sys
import time
from pathlib import Path

from align.cli import main
from align.distributed import signals
from align.distributed.journal import Journal


def hold():
    """Wait to be killed, for ten minutes at most."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(600)
    while True:
        signal.pause()


def hold_after_items(number):
    add = Journal.add

    def held(journal, key, value):
        add(journal, key, value)
        if len(journal.done) >= number:
            hold()

    Journal.add = held


def hold_after_steps(number, file):
    from align.train.loop import Loop  # noqa: PLC0415 - imports torch

    step = Loop.step

    def held(loop, taken):
        until = time.monotonic() + 600
        while taken >= number and file.exists() and not any(stop.requested for stop in signals._deferring):
            assert time.monotonic() < until
            time.sleep(0.02)
        return step(loop, taken)

    Loop.step = held


if __name__ == "__main__":
    what, number, *words = sys.argv[1:]
    if what == "items":
        hold_after_items(int(number))
    else:
        hold_after_steps(int(number), Path(words.pop(0)))
    sys.argv = ["align", *words]
    main()
