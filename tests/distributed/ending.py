"""Two processes of which one ends long before the other: accelerate launch ... ending.py EARLY ends|waits FILE.

Their heartbeats have a clock that runs slowly, so that a busy machine is no reason to miss one of them. Once the early
one has ended, which the file says, the clock of the other one leaps from heartbeat to heartbeat.
"""

import atexit
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState

from align.distributed import heartbeat


class Clock:
    """In place of `time`."""

    sleep = staticmethod(time.sleep)
    leapt_s = 0.0

    def monotonic(self):
        return time.monotonic() / 100 + self.leapt_s


def leave_early(beat, file):
    """End, or come to the end of the work and wait there for the other, as a process of a step does."""
    if sys.argv[2] == "waits":
        heartbeat.stop_heartbeats()
        beat._sender.join()
        file.touch()
        torch.distributed.barrier()


def outlast_the_other(beat, file):
    """Go on for twice the time after which a silent process is missed."""
    while not file.exists():
        time.sleep(0.02)
    for _ in range(8):
        answered, began = beat._last_response, time.monotonic()
        heartbeat.time.leapt_s += heartbeat.TIMEOUT_S / 4
        while beat._last_response == answered and not beat.stopped.is_set() and time.monotonic() - began < 10:
            time.sleep(0.02)
    if sys.argv[2] == "waits":
        torch.distributed.barrier()
    print("{}", flush=True)


if __name__ == "__main__":
    heartbeat.INTERVAL_S, heartbeat.time = 0.2, Clock()
    joined, file = PartialState(cpu=True, backend="gloo"), Path(sys.argv[3])
    is_early = joined.process_index == int(sys.argv[1])
    if is_early and sys.argv[2] == "ends":
        atexit.register(file.touch)  # after the end of the heartbeats, which registers later
    beat = heartbeat.get_heartbeat(joined.process_index, joined.num_processes)
    torch.distributed.barrier()
    leave_early(beat, file) if is_early else outlast_the_other(beat, file)
