"""Runs that come out the same in one process and in several: accelerate launch ... distributed_runs.py FOLDER CASES.

CASES are names of CASES, joined by commas; a third argument holds more settings of all of them, in JSON. Prints what
the model was wrapped in, and how its weights lay.
"""

import json
import os
import sys
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from tiny_rewards import NAMES, WEIGHTS, rated
from tiny_rewards import model as reward_model
from tiny_training import (
    Killed,
    Recorder,
    comparisons,
    demonstrations,
    distillation,
    hybrid_policy,
    labelled,
    loop,
    metrics,
    mixture_policy,
    numbers,
    policy,
    preference,
    same,
    supervised,
    weights,
    with_adapters,
)
from tiny_training import settings as training_settings

from align.distributed.launch import launched_with
from align.train.objectives.chosen_tokens import ChosenTokensObjective
from align.train.objectives.reward import reward_objective
from align.train.selection.selection import FixedModel, Selection
from align.train.selection.settings import SelectionSettings
from align.train.sharding.accelerator import make_accelerator
from align.train.training_run import Teacher

# Clocks differ: the first rank finds it time for a checkpoint when the other does not.
OFTEN = 1e-9 if os.environ.get("RANK", "0") == "0" else 1e9

STEPS, KILLED_AFTER, RESUMED_AFTER = 6, 5, 4
# Objective, training data and settings of each run, with held-out rows
CASES = {
    "sft": (supervised(), demonstrations(20), {"tokens_per_micro_batch": 90}),
    # Very unequal groups, so that ranks have different numbers of them, and a last step of an epoch of one group
    "rpo": (
        preference("rpo_bwd_kl", beta=0.1, sft_weight=0.02),
        comparisons(17, sizes=(1, 2, 5), longest=60),
        {"tokens_per_micro_batch": 200, "checkpoint_minutes": OFTEN},
    ),
    # Steps of one group: a rank has none
    "alone": (preference("dpo"), comparisons(3), {"prompts_per_step": 1}),
    "adapters": (preference("dpo"), comparisons(20), {"tokens_per_micro_batch": 200}),
    "reward": (
        reward_objective("regression", NAMES, WEIGHTS),
        rated(17),
        {"tokens_per_micro_batch": 200, "keep": "best", "evaluate_every": 1, "learning_rate": 2e-2},
    ),
    # Ranks without a prompt whose responses they could pair, and a last step of an epoch of one prompt
    "kto": (preference("kto"), labelled(17, sizes=(1, 1, 3)), {"tokens_per_micro_batch": 100}),
    "weighted": (preference("dpo", beta=1.0, weighting="wpo"), comparisons(20), {"tokens_per_micro_batch": 200}),
    "mixture": (preference("dpo"), comparisons(20), {"tokens_per_micro_batch": 200}),
    # Small steps, as its recurrences amplify rounding
    "hybrid": (preference("dpo"), comparisons(20), {"tokens_per_micro_batch": 200, "learning_rate": 3e-4}),
    # Killed between the first and the second of the snapshots whose mean the weights become in the end
    "resumed": (preference("dpo"), comparisons(20), {"checkpoint_steps": 2, "average": {"last": 2, "every": 3}}),
    "bf16": (
        preference("rpo_bwd_kl", beta=0.1, sft_weight=0.02),
        comparisons(17, sizes=(1, 2, 5), longest=60),
        {"tokens_per_micro_batch": 200, "precision": "bf16"},
    ),
    "bf16 reduced": (
        supervised(),
        demonstrations(20),
        {"tokens_per_micro_batch": 90, "precision": "bf16", "reduce_dtype": "bf16"},
    ),
    # Rows chosen by the loss of a policy that was trained for it, in 6 steps of the 2 epochs
    "selected": (supervised(), demonstrations(96), {"tokens_per_micro_batch": 90}),
    # Rows chosen jointly by their first tokens; the last step of an epoch scores one row, which a rank has not
    "embedded": (supervised(), demonstrations(65), {"tokens_per_micro_batch": 90}),
    "gradient": (preference("dpo"), comparisons(96), {"tokens_per_micro_batch": 200}),
    "scorer": (supervised(), demonstrations(96), {"tokens_per_micro_batch": 90}),
    # Half of the chosen rows skip a layer
    "layers": (supervised(), demonstrations(96), {"tokens_per_micro_batch": 90}),
    "tokens": (ChosenTokensObjective(0.4), demonstrations(20), {"tokens_per_micro_batch": 90}),
    "distilled": (distillation(beta=0.5, top_k=8, sft_weight=1.0), demonstrations(20), {"tokens_per_micro_batch": 90}),
    # Gradients reduced in each micro-batch, to the shares where they are shared out; a tracker that ends before saving
    "each": (
        supervised(),
        demonstrations(20),
        {"tokens_per_micro_batch": 90, "reduce": "each", "trackers": ["tensorboard"]},
    ),
}
# In fp64, where next to nothing is rounding; with groups above a small budget, which run in parts
EXACT = {
    "exact": (preference("dpo", sft_weight=0.1), comparisons(17, sizes=(1, 2, 5), longest=60), {}),
    "parts": (preference("dpo"), comparisons(17, sizes=(2, 5)), {"tokens_per_micro_batch": 60}),
}
# With weights in bf16; killed and resumed, too, which must be exact
BF16_WEIGHTS = {
    mode: (preference("dpo"), comparisons(20), {"precision": "bf16", "weights": mode, "checkpoint_steps": 2})
    for mode in ("bf16_master", "bf16_stochastic")
}
# A run that is killed after step 5, and what another number of processes makes of it, from the checkpoint of step 4
MOVED = dict.fromkeys(
    ("stopped", "continued"), (supervised(), demonstrations(65), {"tokens_per_micro_batch": 90, "checkpoint_steps": 2})
)
JOINT = {
    "score": "learnability",
    "reference": "cross_fit:other",
    "filter": 0.75,
    "chunks": 4,
    "coupling": "embedding",
    "coupling_weight": 5.0,
    "score_tokens": 6,
}
SELECTIONS = {
    "selected": {"score": "learnability", "reference": "step:other", "filter": 0.75, "chunks": 4},
    "embedded": JOINT,
    "gradient": JOINT | {"coupling": "gradient"},
    "scorer": {"scorer": "step:small", "reference": "cross_fit:other", "filter": 0.75, "chunks": 4, "every": 2},
    "layers": {"score": "hard", "filter": 0.75, "chunks": 4, "score_layers": 1},
    "tokens": {"reference": "step:other", "tokens": 0.4},
    **dict.fromkeys(MOVED, JOINT),
}


def chosen_by(settings):
    """A selection by models that were trained for it, of which the scorer is smaller than the policy."""
    seeds = (5, 6) if settings.get("reference", "").startswith("cross_fit") else (5,)
    fixed = (
        {"reference": FixedModel(loads=[partial(policy, seed) for seed in seeds])} if "reference" in settings else {}
    )
    if "scorer" in settings:
        fixed["scorer"] = FixedModel(loads=[partial(policy, 7, hidden_size=16)])
    return Selection(settings=SelectionSettings(**settings), fixed=fixed)


def join_fsdp():
    """Let accelerate join FSDP2 on a CPU, which it does for accelerators alone, and once more for another run."""
    if launched_with("FSDP"):
        if "distributed_type" in PartialState._shared_state:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        PartialState._prepare_backend = lambda self, cpu, sm=False, backend=None: ("gloo", DistributedType.MULTI_GPU)


def cut_everything(accelerator):
    """Let ZeRO-3 share out the smallest parameter too and gather it anew each time, as it does with large ones."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        names = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero |= {f"stage3_{name}": 0 for name in names}
    return accelerator


def run_case(folder, name, **more):
    """The finished run; in the first process it leaves metrics.jsonl and trained.safetensors.

    With a checkpoint it is killed on the way and goes on, and must be what a run that nobody kills is, bit for bit.
    """
    objective, train, settings = (CASES | EXACT | BF16_WEIGHTS | MOVED)[name]
    killed = "checkpoint_steps" in settings

    def make(folder, stop_after=None):
        model = {
            "adapters": partial(with_adapters, dropout=0.2),
            "reward": reward_model,
            "mixture": mixture_policy,
            "hybrid": hybrid_policy,
        }.get(name, policy)()
        model = model.double() if name in EXACT else model
        if name == "rpo":
            model.base.gradient_checkpointing_enable({"use_reentrant": False})
        made = {"reward": rated, "kto": labelled}.get(name, partial(comparisons, sizes=(2, 3)))
        held_out = made(3, seed=9)
        changes = {"epochs": 2, "evaluate_every": 3} | settings | more
        join_fsdp()
        joined = cut_everything(make_accelerator(training_settings(**changes)))
        report, job = Recorder(stop_after), {"held_out": held_out}
        if name in SELECTIONS:
            job["selection"] = chosen_by(SELECTIONS[name])
        if name == "distilled":
            job["teacher"] = Teacher(partial(policy, seed=5), 8)
        return loop(folder, objective, train, model=model, progress=report, accelerator=joined, job=job, **changes)

    if killed and name != "continued":
        made = make(folder, stop_after=KILLED_AFTER)
        with suppress(Killed):
            made.run()
        if name == "stopped":
            return made
    made = make(folder)
    made.run()
    assert len(made.progress.steps) == STEPS - RESUMED_AFTER * killed
    trained = weights(made.policy)
    if killed and name != "continued":
        whole = make(folder / "whole")
        whole.run()
        assert not whole.accelerator.is_main_process or numbers(folder / "whole") == numbers(folder)
        assert same(trained, weights(whole.policy))
    if made.accelerator.is_main_process:
        save_file(trained, folder / "trained.safetensors")
    made.accelerator.wait_for_everyone()
    return made


@cache
def alone(name):
    """The metrics and the folder of a case run in one process."""
    folder = Path(mkdtemp())
    run_case(folder, name)
    return metrics(folder), folder


if __name__ == "__main__":
    torch.set_num_threads(1)
    more = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    for case in sys.argv[2].split(","):
        made = run_case(Path(sys.argv[1]) / case, case, **more)
        cut = sum(not getattr(value, "ds_persist", True) for value in made.policy.parameters())
        told = {"case": case, "processes": made.accelerator.num_processes, "wrapped": type(made.model).__name__}
        print(json.dumps(told | {"way": type(made.sharding).__name__, "cut": cut}), flush=True)
        made.accelerator.free_memory()
    os._exit(0)  # torch with gloo aborts at random while the interpreter comes down
