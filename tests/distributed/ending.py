"""Two processes of which one ends long before the other: accelerate launch ... ending.py EARLY ends|waits."""

import sys
import time

import torch
from accelerate import PartialState

from align.distributed import heartbeat


def leave_early():
    """End, or come to the end of the work and wait there for the other, as a process of a step does."""
    if sys.argv[2] == "waits":
        heartbeat.stop_heartbeats()
        torch.distributed.barrier()


if __name__ == "__main__":
    heartbeat.INTERVAL_S, heartbeat.TIMEOUT_S = 0.3, 3.0
    joined = PartialState(cpu=True, backend="gloo")
    heartbeat.get_heartbeat(joined.process_index, joined.num_processes)
    torch.distributed.barrier()
    if joined.process_index == int(sys.argv[1]):
        leave_early()
    else:
        time.sleep(2 * heartbeat.TIMEOUT_S)
        if sys.argv[2] == "waits":
            torch.distributed.barrier()
        print("{}", flush=True)
