"""Runs that come out the same in one process and in several: accelerate launch ... distributed_runs.py FOLDER."""

import os
import sys
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_rewards import NAMES, WEIGHTS, rated
from tiny_rewards import model as reward_model
from tiny_training import (
    Killed,
    Recorder,
    comparisons,
    demonstrations,
    loop,
    policy,
    preference,
    supervised,
    weights,
    with_adapters,
)

from align.train.reward_objective import reward_objective

# Clocks differ: the first rank finds it time for a checkpoint when the other does not.
OFTEN = 1e-9 if os.environ.get("RANK", "0") == "0" else None

# Objective, training data and settings of each run; ten steps with held-out rows
CASES = {
    "sft": (supervised(), demonstrations(36), {"tokens_per_micro_batch": 90}),
    # Very unequal groups, so that ranks have different numbers of them, and a last step of an epoch of one group
    "rpo": (
        preference("rpo_bwd_kl", beta=0.1, sft_weight=0.02),
        comparisons(33, sizes=(1, 2, 5), longest=60),
        {"tokens_per_micro_batch": 200, "checkpoint_minutes": OFTEN},
    ),
    # Steps of one group: a rank has none
    "alone": (preference("dpo"), comparisons(10), {"groups_per_step": 1, "epochs": 1}),
    "adapters": (preference("dpo"), comparisons(36), {"tokens_per_micro_batch": 200}),
    "reward": (
        reward_objective("regression", NAMES, WEIGHTS),
        rated(33),
        {"tokens_per_micro_batch": 200, "keep": "best", "evaluate_every": 1, "learning_rate": 2e-2},
    ),
    "resumed": (preference("dpo"), comparisons(36), {"checkpoint_steps": 3}),
}


def run_case(folder, name):
    """The finished run; in the first process it leaves metrics.jsonl and trained.safetensors."""
    objective, train, settings = CASES[name]

    def make(stop_after=None):
        model = {"adapters": with_adapters, "reward": reward_model}.get(name, policy)()
        if name == "rpo":
            model.base.gradient_checkpointing_enable({"use_reentrant": False})
        held_out = rated(3, seed=9) if name == "reward" else comparisons(3, sizes=(2, 3), seed=9)
        job = {"held_out": held_out}
        changes = {"epochs": 2, "evaluate_every": 3} | settings
        return loop(folder, objective, train, model=model, report=Recorder(stop_after), job=job, **changes)

    if name == "resumed":
        with suppress(Killed):
            make(stop_after=8).run()
    made = make()
    made.run()
    assert len(made.report.steps) == (4 if name == "resumed" else 10)
    if made.accelerator.is_main_process:
        save_file(weights(made.policy), folder / "trained.safetensors")
    made.accelerator.wait_for_everyone()
    return made


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in CASES:
        made = run_case(Path(sys.argv[1]) / case, case)
        assert (made.accelerator.num_processes, type(made.model).__name__) == (2, "DistributedDataParallel")
    os._exit(0)  # torch with gloo aborts at random while the interpreter comes down
