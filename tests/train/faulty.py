"""`align` with a fault in its second process.

accelerate launch ... faulty.py FAULT STEP train RECIPE --step NAME
"""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import psutil
import torch

from align import cli
from align.distributed import heartbeat
from align.train import checkpoint
from align.train.loop import Loop

FAULT, STEP = sys.argv[1], int(sys.argv[2])


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def nan(loop):
    kind = type(loop.training_run.objective)
    called = kind.__call__

    def spoiled(self, policy, batch):
        result = called(self, policy, batch)
        return replace(result, loss=result.loss * torch.nan)

    kind.__call__ = spoiled


def write_half(parts, file):
    save_file(parts, file)
    os.truncate(file, file.stat().st_size // 2)
    die()


def write_nothing(parts, file):
    raise OSError(28, "No space left on device", str(file))


def stop(loop):
    """Stop this process until the other one has ended; a launcher would kill it half a minute later."""
    own = os.getpid()
    (other,) = {each.pid for each in psutil.Process(os.getppid()).children()} - {own}
    kill = f"while kill -0 {other} 2>&-; do sleep 0.2; done; sleep 1; kill -KILL {own}"
    subprocess.Popen(["sh", "-c", kill])
    os.kill(own, signal.SIGSTOP)


def tell(loop):
    os.kill(os.getpid(), signal.SIGTERM)


# What happens in the step, and to its writing of a checkpoint
FAULTS = {
    "killed": (lambda loop: die(), None),
    "nan": (nan, None),
    "torn": (None, write_half),
    "full": (None, write_nothing),
    "silent": (stop, None),
    "told": (tell, None),
}
save_file = checkpoint.save_file


def step(loop, number):
    """A step as it is, in which the fault comes before the given one."""
    if number + 1 == STEP and os.environ["RANK"] == "1":
        in_step, in_saving = FAULTS[FAULT]
        if in_saving:
            checkpoint.save_file = in_saving
        if in_step:
            in_step(loop)
    return taken(loop, number)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if FAULT == "silent":
        heartbeat.TIMEOUT_S = 10.0
    taken, Loop.step = Loop.step, step
    sys.argv = ["align", *sys.argv[3:]]
    cli.main()
