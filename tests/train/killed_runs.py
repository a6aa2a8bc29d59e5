"""A run that is killed at moments of chance until it comes to its end: python killed_runs.py FOLDER.

Prints a list of the kills as JSON. The same run, not killed, is left in FOLDER/whole.
"""

import json
import os
import random
import signal
import sys
import time
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_training import comparisons, loop, preference, weights

from align.train import checkpoint


def live(folder, most=None):
    """One life of the run in a process of its own, from its latest checkpoint; the id of the process.

    After so many checkpoints it waits in the writing of the next one to be killed, however late its parent is.
    """
    child = os.fork()
    if child:
        return child
    written = count()

    def save_or_wait(tensors, file):
        save_file(tensors, file)
        if next(written) == most:
            signal.alarm(600)
            signal.pause()

    checkpoint.save_file = save_or_wait
    torch.set_num_threads(1)
    train = comparisons(18, sizes=(2, 3))
    objective = preference("rpo_bwd_kl", beta=0.1, sft_weight=0.02)
    made = loop(folder, objective, train, prompts_per_step=6, epochs=4, checkpoint_steps=1)
    made.run()
    save_file(weights(made.policy), folder / "trained.safetensors")
    os._exit(0)


def num_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def partials(folder):
    return set(folder.glob(".checkpoint-*.partial-*"))


def checkpoints(folder):
    return set(folder.glob("checkpoint-*"))


def kill(folder, delay_s):
    """What a life was doing when it was killed, or None if it came to its end before.

    Killed `delay_s` seconds after its first checkpoint; without a delay, as soon as it is seen to write one.
    """
    seen = partials if delay_s is None else checkpoints
    before, left = seen(folder), partials(folder)
    child = live(folder, 0 if delay_s is None else 2)
    while not seen(folder) - before:
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return None
        time.sleep(0.001)
    time.sleep(delay_s or 0)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        return None
    return {"lines": num_lines(folder / "metrics.jsonl"), "writing": len(partials(folder) - left)}


if __name__ == "__main__":
    root = Path(sys.argv[1])
    os.waitpid(live(root / "whole"), 0)
    draw, kills = random.Random(0), []
    while True:
        # Every second life ends while it writes, the others at any moment of a step.
        delay_s = draw.uniform(0, 0.02) if len(kills) % 2 else None
        found = kill(root / "killed", delay_s)
        if found is None:
            break
        kills.append(found)
    print(json.dumps(kills))
