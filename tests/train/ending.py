"""Two processes of which one ends long before the other: accelerate launch ... ending.py EARLY."""

import sys
import time

import torch
from accelerate import PartialState

from align.train import heartbeat

if __name__ == "__main__":
    heartbeat.SILENCE_S = 2.0
    joined = PartialState(cpu=True, backend="gloo")
    heartbeat.heartbeat(joined.process_index, joined.num_processes)
    torch.distributed.barrier()
    if joined.process_index != int(sys.argv[1]):
        time.sleep(3 * heartbeat.SILENCE_S)
        print("{}", flush=True)
