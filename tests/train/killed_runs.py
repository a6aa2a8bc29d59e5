"""A run that is killed at moments of chance until it comes to its end: python killed_runs.py FOLDER.

Prints a list of the kills as JSON. The same run, not killed, is left in FOLDER/whole.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_training import comparisons, loop, preference, weights


def live(folder):
    """One life of the run in a process of its own, from its latest checkpoint; the id of the process."""
    child = os.fork()
    if child:
        return child
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
    return len(list(folder.glob(".checkpoint-*.partial-*")))


def kill(child, folder, delay_s):
    """What the run was doing when it was killed, or None if it came to its end before.

    Killed `delay_s` seconds after its first step; without a delay, as soon as it is seen to write a checkpoint.
    """
    before = num_lines(folder / "metrics.jsonl")
    while num_lines(folder / "metrics.jsonl") <= before:  # each life takes one step at least
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return None
        time.sleep(0.001)
    if delay_s is None:
        while not partials(folder):
            if os.waitpid(child, os.WNOHANG) != (0, 0):
                return None
    else:
        time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        return None
    return {"lines": num_lines(folder / "metrics.jsonl"), "writing": partials(folder)}


if __name__ == "__main__":
    root = Path(sys.argv[1])
    os.waitpid(live(root / "whole"), 0)
    draw, kills = random.Random(0), []
    while True:
        # Every second life ends while it writes, the others at any moment of a step.
        delay_s = draw.uniform(0, 0.02) if len(kills) % 2 else None
        found = kill(live(root / "killed"), root / "killed", delay_s)
        if found is None:
            break
        kills.append(found)
    print(json.dumps(kills))
