"""Saves of models whose weights lie over two processes: accelerate launch ... sharded_saves.py FOLDER TOKENIZER.

For each case the first process writes the complete weights, with adapters merged by peft, as FOLDER/CASE/whole, and all
together the model as FOLDER/CASE/saved. Each process prints what it held at most beyond its shards, in bytes, and the
largest single weight.
"""

import gc
import json
import os
import sys
from pathlib import Path

import torch
from distributed_runs import cut_everything, join_fsdp
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora import Embedding, Linear
from safetensors.torch import save_file
from tiny_rewards import NAMES, WEIGHTS, rated
from tiny_rewards import model as reward_model
from tiny_training import comparisons, llama, loop, mixture_policy, policy, preference, settings, supervised, weights
from transformers import AutoTokenizer

from align.models.adapters.files import adapter_weights
from align.models.adapters.merging import merge_and_untie
from align.models.policy import Policy, save_policy
from align.models.reward_model import load_saved_reward_model, save_reward_model
from align.models.saving import weights as saving
from align.models.settings import PolicySettings
from align.stages.training.saving import load_saved_policy, save_trained
from align.train.objectives.reward import reward_objective
from align.train.sharding.accelerator import make_accelerator

LIMIT = 40_000  # bytes of a file
REWARDS = reward_objective("regression", NAMES, WEIGHTS)
KEPT = "kept adapters"


def adapted(targets, **changes):
    """A policy with new adapters; with changes of the model they are LoRA, without them DoRA."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", use_dora=not changes)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Policy(get_peft_model(llama(**changes), config)).train()


# Model, objective, rows, settings, and the dtype of the files
CASES = {
    "tied": (lambda: policy(tie_word_embeddings=True), supervised(), comparisons(8), {}, "bf16"),
    "experts": (mixture_policy, preference("dpo"), comparisons(8), {}, "fp32"),
    "reward": (reward_model, REWARDS, rated(8), {}, "original"),
    "adapters": (lambda: adapted("all-linear"), supervised(), comparisons(8), {}, "fp32"),
    "tied adapters": (
        lambda: adapted(["embed_tokens", "k_proj"], tie_word_embeddings=True),
        supervised(),
        comparisons(8),
        {},
        "bf16",
    ),
    KEPT: (lambda: adapted(["q_proj", "down_proj"]), supervised(), comparisons(8), {}, "fp32"),
}
BF16 = {"precision": "bf16", "weights": "bf16_master"}  # FSDP2 alone
MASTER = {"master": (policy, supervised(), comparisons(8), BF16, "fp32")}


class Meter:
    """Bytes of new tensors and of the model's parameters, each storage once, when a save holds most of them."""

    def __init__(self, model):
        gc.collect()
        gc.freeze()  # what exists is not looked at
        self.parameters = list(model.parameters())
        self.most, self.before = 0, self.now()

    def now(self):
        found = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
        found += [getattr(each, "_local_tensor", each) for each in self.parameters]
        storages = [each.untyped_storage() for each in found if each.device.type == "cpu"]
        return sum({each.data_ptr(): each.nbytes() for each in storages}.values())

    def after(self, function):
        def measured(*arguments, **named):
            result = function(*arguments, **named)
            self.most = max(self.most, self.now() - self.before)
            return result

        return measured

    def around(self, function):
        def measured(*arguments, **named):
            self.most = max(self.most, self.now() - self.before)
            return function(*arguments, **named)

        return measured


DELTAS = {layer: layer.get_delta_weight for layer in (Linear, Embedding)}


def with_peft(model, trained, *, merged):
    """The weights of a model that is whole in this process: what a save writes of them, in fp32."""
    model.hf.load_state_dict(trained)
    found = merge_and_untie(model.hf).state_dict() if merged else adapter_weights(model.hf)
    return {name: value.detach() for name, value in found.items()}


def save(case, folder, tokenizer):
    make, objective, rows, changes, dtype = (CASES | MASTER)[case]
    join_fsdp()
    joined = cut_everything(make_accelerator(settings(**changes)))
    made = loop(folder / "run", objective, rows, model=make(), accelerator=joined, **changes)
    result = made.run()
    whole, target = weights(made.policy), folder / "saved"
    if isinstance(made.policy.hf, PeftModel):
        whole = with_peft(make(), whole, merged=case != KEPT)
    target.mkdir(exist_ok=True)
    if made.accelerator.is_main_process:
        save_file({name: value.clone() for name, value in whole.items()}, folder / "whole.safetensors")
    largest = max(value.nbytes for value in whole.values())
    del whole
    is_reward = case == "reward"

    def write(trained, gather):
        gc.collect()  # what the forward pass before has left behind
        gather.complete = meter.after(gather.complete)
        if is_reward:
            trained.base.config.pad_token_id = 5  # of the model, whose vocabulary is smaller than the tokenizer's
            return save_reward_model(trained, tokenizer, target, dtype=dtype, gather=gather)
        return save_policy(trained, tokenizer, target, dtype=dtype, gather=gather, merge=case != KEPT)

    def load(dtype):
        asked.append(str(dtype))
        if case == KEPT:
            loaded = make()
            set_peft_model_state_dict(loaded.hf, load_peft_weights(str(target)))
            return loaded
        return (
            load_saved_reward_model(target, dtype) if is_reward else load_saved_policy(target, PolicySettings(), dtype)
        )

    asked, meter = [], Meter(made.policy)
    saving.tensor_digest, saving.save_file = meter.around(saving.tensor_digest), meter.around(saving.save_file)
    for layer in (Linear, Embedding):
        layer.get_delta_weight = meter.after(DELTAS[layer])
    said = save_trained(made, result, target, save=write, load_saved=load)
    told = {"case": case, "main": made.accelerator.is_main_process, "most": meter.most, "largest": largest}
    print(json.dumps(told | said["saved"] | {"loaded": asked}), flush=True)
    made.accelerator.free_memory()


if __name__ == "__main__":
    torch.set_num_threads(1)
    saving.SHARD_BYTES = LIMIT
    originals = saving.tensor_digest, saving.save_file
    for name in sys.argv[3].split(","):
        saving.tensor_digest, saving.save_file = originals
        save(name, Path(sys.argv[1]) / name, AutoTokenizer.from_pretrained(sys.argv[2]))
    os._exit(0)  # torch with gloo aborts at random while the interpreter comes down
