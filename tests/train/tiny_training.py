"""Tiny random policies, token groups made by hand, and whole runs over them; also for child processes of tests."""

import json
import random
from dataclasses import replace

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from align.data.token_groups import TokenGroup, TokenSequence
from align.models.policy import Policy
from align.models.weights import full_tensor, gathered_parameters
from align.train.distillation.objective import DistillationObjective
from align.train.distillation.settings import DistillationSettings
from align.train.loop import Loop
from align.train.objectives.preference import PreferenceObjective
from align.train.objectives.settings import PreferenceSettings
from align.train.objectives.supervised import SupervisedObjective
from align.train.settings import TrainSettings
from align.train.training_run import TrainingRun

VOCABULARY = 120


class Killed(Exception):
    """What a Recorder raises in place of a kill."""


class Recorder:
    """A reporter that keeps what it is told, and ends the run after step `stop_after`, where one is given."""

    def __init__(self, stop_after=None):
        self.notes, self.phases, self.steps, self.stop_after = [], [], [], stop_after

    def note(self, text):
        self.notes.append(text)

    def phase(self, name, total, done=0):
        self.phases.append((name, total, done))

    def advance(self, units, metrics=None):
        if metrics is not None:
            self.steps.append(metrics)
            if metrics["step"] == self.stop_after:
                raise Killed


# What two runs of the same numbers may differ in: a clock and a meter
NOT_NUMBERS = ("seconds", "peak_memory_bytes")


# Of a decoder whose weights are large enough for its log-probabilities to differ from uniform
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}


def llama(seed=0, **changes):
    """A random Llama whose weights are large enough for its log-probabilities to differ from uniform."""
    values = {
        **SIZES,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "attn_implementation": "sdpa",
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(values | changes)))


def policy(seed=0, **changes):
    return Policy(llama(seed, **changes)).train()


def mixture(kind="mixtral", **changes):
    """A random mixture of experts whose router auxiliary loss weighs enough to move the weights."""
    experts = {
        "mixtral": {"num_local_experts": 4, "intermediate_size": 48},
        "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 24, "head_dim": 8, "mlp_only_layers": [0]},
    }
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "initializer_range": 0.1,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **(values | experts[kind] | changes))
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def mixture_policy(kind="mixtral", **changes):
    return Policy(mixture(kind, **changes)).train()


def hybrid_policy():
    """A random Qwen3.5: two gated delta nets and attention, without the vision blocks that its class names."""
    values = {
        **SIZES,
        "num_hidden_layers": 3,
        "head_dim": 8,
        "initializer_range": 0.05,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model("qwen3_5_text", **values)
        return Policy(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")).train()


def with_adapters(dropout=0.0):
    """A policy whose base stands still under adapters with weights of their own."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=dropout, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Policy(get_peft_model(llama(), config)).train()


def sequence(prompt, response):
    """Token ids of which those of the response are trained."""
    ids = np.array([*prompt, *response], dtype=np.int32)
    trained = np.arange(len(ids)) >= len(prompt)
    return TokenSequence(ids, trained)


def group(prompt, responses, rewards=None, chosen=None, row=0):
    sequences = tuple(sequence(prompt, response) for response in responses)
    return TokenGroup(sequences, rewards and tuple(rewards), chosen, ({},) * len(sequences), row)


def comparisons(number, *, sizes=(2,), longest=24, seed=0):
    """Groups of unequal lengths and sizes with rewards; every fifth shares the prompt of the one before it."""
    draw = random.Random(seed)
    tokens = lambda low, high: [draw.randrange(VOCABULARY) for _ in range(draw.randint(low, high))]  # noqa: E731
    groups, prompt = [], []
    for row in range(number):
        prompt = prompt if row % 5 == 4 else tokens(2, 12)
        responses = [tokens(1, longest) for _ in range(draw.choice(sizes))]
        groups.append(group(prompt, responses, [draw.gauss(0, 1) for _ in responses], row=row))
    return groups


def labelled(number, *, sizes=(1,), longest=24, seed=0):
    """Groups whose responses have labels, rewards of 1 and 0, in any numbers."""
    groups = comparisons(number, sizes=sizes, longest=longest, seed=seed)
    return [replace(each, rewards=tuple(float(reward > 0) for reward in each.rewards)) for each in groups]


def demonstrations(number, *, longest=40, seed=0):
    """One sequence a row, without rewards; from one supervised token to `longest`."""
    return [
        TokenGroup(each.sequences, None, None, each.attributes, each.row)
        for each in comparisons(number, sizes=(1,), longest=longest, seed=seed)
    ]


def preference(name, *, sft_weight=0.0, sft_per_token=False, **settings):
    return PreferenceObjective(
        PreferenceSettings(name=name, settings=settings, sft_weight=sft_weight, sft_per_token=sft_per_token)
    )


def settings(**changes):
    """Training settings under which clipping, warm-up and decay all act."""
    values = {
        "learning_rate": 3e-3,
        "schedule": "cosine",
        "warmup_steps": 3,
        "prompts_per_step": 8,
        "tokens_per_micro_batch": 10**6,
        "max_grad_norm": 1.0,
        "checkpoint_minutes": None,
    }
    return TrainSettings(**(values | changes))


def loop(
    folder, objective, train, *, model=None, progress=None, references=None, accelerator=None, job=None, **changes
):
    """A loop over `train` that writes to `folder`; `job` holds more fields of TrainingRun, `changes` are settings."""
    made = TrainingRun(
        objective=objective,
        train=train,
        settings=settings(**changes),
        folder=folder,
        references=references or folder / "references",
        **(job or {}),
    )
    return Loop(model or policy(), made, progress or Recorder(), accelerator)


def distillation(**settings):
    return DistillationObjective(DistillationSettings(**settings))


def supervised():
    return SupervisedObjective()


def metrics(folder):
    """Every line of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def results(made):
    """Train; every line of the metrics, and the trained weights."""
    made.run()
    return metrics(made.training_run.folder), weights(made.policy)


def numbers(folder):
    """The lines without what a clock or a meter has put there."""
    return [{name: value for name, value in line.items() if name not in NOT_NUMBERS} for line in metrics(folder)]


def chosen(folder):
    """The groups that each step of a run with a selection chose."""
    lines = [json.loads(line) for line in (folder / "selection.jsonl").read_text().splitlines()[1:]]
    return [groups for _, steps, _ in lines for groups, _ in steps]


def weights(trained):
    """A copy of all weights by name, in full however they lie over processes."""
    found = {}
    for name, value in trained.hf.state_dict(keep_vars=True).items():
        with gathered_parameters([value]):
            found[name] = full_tensor(value.detach()).to("cpu", copy=True)
    return found


def gap(first, second):
    """Largest difference between two sets of weights."""
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def same(first, second):
    """Whether two sets of weights are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def killed_and_whole(make, folder):
    """Return a run that was killed after step 3 and went on, with the same weights and numbers as an undisturbed one.

    `make(folder, **more)` makes the run, with a Recorder as its progress.
    """
    try:
        make(folder / "killed", progress=Recorder(stop_after=3)).run()
    except Killed:
        pass
    else:
        raise AssertionError("the run ended before step 3")
    resumed, whole = (make(folder / name) for name in ("killed", "whole"))
    for made in (resumed, whole):
        made.run()
    assert len(resumed.progress.steps) < len(whole.progress.steps)
    assert same(weights(resumed.policy), weights(whole.policy))
    assert numbers(folder / "killed") == numbers(folder / "whole")
    return resumed
