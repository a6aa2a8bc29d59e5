"""Adapters that are merged while weights are saved, one at a time, give the files of peft's merge in a whole model."""

import hashlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import SMALL, learned
from transformers import AutoConfig, AutoModelForCausalLM

from align.data.tokenizer import train_tokenizer
from align.models.policy import Policy, save_policy
from align.models.saving.weights import Gather

LLAMA = SMALL | {"model_type": "llama", "tie_word_embeddings": False}
TIED = LLAMA | {"tie_word_embeddings": True}
GPT2 = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
LINEAR = {"target_modules": "all-linear"}
# Configuration of the model and of the adapters
CASES = {
    "linear layers": (LLAMA, LINEAR),
    "rank-stabilized": (LLAMA, {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "DoRA": (LLAMA, LINEAR | {"use_dora": True}),
    "embeddings": (LLAMA, {"target_modules": ["embed_tokens", "k_proj"]}),
    "tied embeddings": (TIED, {"target_modules": ["embed_tokens", "k_proj"]}),
    "DoRA on tied embeddings": (TIED, {"target_modules": ["embed_tokens", "up_proj"], "use_dora": True}),
    "a trained copy of a tied head": (TIED, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
    "transposed layers with biases": (GPT2, {"target_modules": ["c_fc", "wte"], "fan_in_fan_out": True}),
    "biases of adapters": (GPT2 | {"model_type": "gpt2"}, {"target_modules": ["c_attn"], "lora_bias": True}),
    "trained biases": (LLAMA | {"attention_bias": True}, {"target_modules": ["q_proj"], "bias": "all"}),
    "experts": (EXPERTS, {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
}


class Parts(Gather):
    """Completes weights that are not sharded, and counts them and the largest number of them at once."""

    def __init__(self):
        self.most = 0

    def complete(self, values):
        self.most = max(self.most, len(values))
        return super().complete(values)


def adapted(model, adapters):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model))
        hf = get_peft_model(hf, LoraConfig(r=3, lora_alpha=8, task_type="CAUSAL_LM", **adapters))
    return learned(Policy(hf), 1)


def files(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|fan_in_fan_out|pattern keys)")
@pytest.mark.parametrize("case", CASES)
def test_adapters_are_merged_into_one_weight_after_another_bit_for_bit(tmp_path, case):
    tokenizer = train_tokenizer(["a b"], vocab_size=259, chat_template="")
    base = {name: value.clone() for name, value in adapted(*CASES[case]).base.state_dict().items()}
    gather = Parts()
    found = save_policy(adapted(*CASES[case]), tokenizer, tmp_path / "parts", gather=gather)
    assert found == save_policy(adapted(*CASES[case]), tokenizer, tmp_path / "whole")
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    # A weight, what two factors have been trained for it, a magnitude and biases; experts lie in two weights
    assert gather.most <= 5
    saved = load_file(tmp_path / "parts/model.safetensors")
    names = {name.replace("base_layer.", ""): name for name in base}
    changed = [name for name in saved if name in names and not torch.equal(saved[name], base[names[name]])]
    assert changed or case == "experts", "whose files have other names"
