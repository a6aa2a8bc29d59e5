"""Runs in bf16 whose weights are gathered in bf16 and in fp32: accelerate launch ... rounded_gathers.py FOLDER.

Each process prints what it has sent in each run, by the tensors that it gave to collectives, and what the ledger says;
the first one leaves the numbers, the weights and the outputs of each run.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from distributed_runs import cut_everything, join_fsdp
from safetensors.torch import save_file
from tiny_rewards import NAMES, WEIGHTS, rated
from tiny_rewards import model as reward_model
from tiny_training import comparisons, loop, policy, settings, supervised, weights

from align.stages.training import policy_training
from align.train.objectives.reward import reward_objective
from align.train.sharding import fsdp, zero
from align.train.sharding.accelerator import make_accelerator
from align.train.sharding.bf16.gathers import autocast_weights

LARGER = {"hidden_size": 64, "intermediate_size": 128}
CASES = {
    "uneven": (partial(policy, vocab_size=121, **LARGER), supervised(), comparisons(24)),
    "reward": (reward_model, reward_objective("regression", NAMES, WEIGHTS), rated(24)),
}
RUNS = {"rounded": {}, "whole": {}, "reduced": {"reduce_dtype": "bf16"}}  # `whole` gathers all weights in fp32
GROUP = torch._C._distributed_c10d.ProcessGroup
SENT = SimpleNamespace(bytes=0)


def count(names, per_byte, which):
    """Count what a collective sends in a ring of two processes, of which each sends half of every tensor at a time.

    `names` are those of torch 2.13 and before it.
    """
    name = next(name for name in names if hasattr(GROUP, name))
    original = getattr(GROUP, name)

    def counted(self, *arguments, **named):
        given = arguments[which]
        for each in given if isinstance(given, list) else [given]:
            SENT.bytes += per_byte * each.nbytes // 2
        return original(self, *arguments, **named)

    setattr(GROUP, name, counted)


def run(folder, case, name):
    """Train for three steps and look at held-out rows in fp32; return what the run says of itself."""
    make, objective, rows = CASES[case]
    changes = {"precision": "bf16", "tokens_per_micro_batch": 90, **RUNS[name]}
    found = (lambda policy: []) if name == "whole" else autocast_weights
    zero.autocast_weights = fsdp.autocast_weights = found
    join_fsdp()
    joined = cut_everything(make_accelerator(settings(**changes)))
    made = loop(folder, objective, rows, model=make(), accelerator=joined, job={"held_out": rows[:4]}, **changes)
    SENT.bytes = 0
    result = made.run()
    sent, said = SENT.bytes, policy_training.work_done(made, result).wire_bytes
    trained, outputs = weights(made.policy), made.outputs()
    if made.accelerator.is_main_process:
        save_file({name: value.clone() for name, value in trained.items()}, folder / "trained.safetensors")
        save_file({"outputs": outputs.values}, folder / "outputs.safetensors")
    told = {"case": case, "run": name, "sent": sent, "said": said, "rounded": made.sharding.num_rounded}
    total = sum(getattr(value, "ds_numel", value.numel()) for value in made.policy.parameters())
    print(json.dumps(told | {"weights": total, "is_rounded": outputs.is_rounded}), flush=True)
    made.accelerator.free_memory()


if __name__ == "__main__":
    torch.set_num_threads(1)
    count(("all_gather_single", "_allgather_base"), 1, 0)
    count(("allreduce",), 2, 0)
    count(("reduce_scatter_single", "_reduce_scatter_base"), 1, 1)
    for case in CASES:
        for name in RUNS if case == "uneven" else ["rounded", "whole"]:
            run(Path(sys.argv[1]) / f"{case}-{name}", case, name)
    os._exit(0)  # torch with gloo aborts at random while the interpreter comes down
