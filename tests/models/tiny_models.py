"""Tiny random models of many architectures, and token sequences that share prefixes."""

import copy

import numpy as np
import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM

from align.data.token_groups import TokenSequence

VOCABULARY = 61
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,  # at transformers' default of 0.02 a wrong mask has little effect
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {  # values narrower than keys
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 6,
    "head_dim": 4,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_key_value_heads": 4,
}
GRANITE = {"logits_scaling": 3.0, "attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}

# Models with a tree forward: name -> (model type, settings)
TREE = {
    "llama": ("llama", {"num_key_value_heads": 4}),
    "llama, grouped heads": ("llama", {}),
    "llama, one key head, tied, biased": (
        "llama",
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gpt2": ("gpt2", GPT),
    "gpt2, scores scaled by layer": ("gpt2", GPT | {"scale_attn_by_inverse_layer_idx": True}),
    "gemma": ("gemma", {}),
    "gemma2": (
        "gemma2",
        {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    ),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 8}),
}
MORE_TREE = {
    "apertus": ("apertus", {}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "cohere2": ("cohere2", {"logit_scale": 0.25}),
    "deepseek_v2": ("deepseek_v2", LATENT | {"n_group": 1}),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "ernie4_5": ("ernie4_5", {}),
    "exaone4": ("exaone4", {"sliding_window": 64}),
    "gemma4": ("gemma4_text", {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}),
    "glm4": ("glm4", {}),
    "gpt_neox": ("gpt_neox", {}),
    "granite": ("granite", GRANITE),
    "granitemoe": ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2, **GRANITE}),
    "jetmoe": ("jetmoe", {"num_local_experts": 4, "kv_channels": 8}),
    "mistral": ("mistral", {"sliding_window": 64}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 64}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "phimoe, noise off": ("phimoe", {"num_local_experts": 4}),
    "qwen2, sliding layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "smollm3": ("smollm3", {}),
    "starcoder2": ("starcoder2", {}),
}
MIXED = {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
CONVOLUTIONS = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
DELTA = MIXED | {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 4}
# Models with recurrent layers, whose tree forward needs the extra `recurrent`: name -> (model type, settings)
RECURRENT = {
    "bamba": ("bamba", MAMBA | {"num_hidden_layers": 3, "attn_layer_indices": [1]}),
    "lfm2": ("lfm2", CONVOLUTIONS),
    "qwen3_next": ("qwen3_next", EXPERTS | DELTA | {"shared_expert_intermediate_size": 16}),
}
MORE_RECURRENT = {
    "granitemoehybrid": (
        "granitemoehybrid",
        MIXED | MAMBA | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16},
    ),
    "lfm2_moe": ("lfm2_moe", EXPERTS | CONVOLUTIONS | {"num_dense_layers": 1}),
    "nemotron_h": (
        "nemotron_h",
        {
            "num_hidden_layers": None,  # follows from the types
            "layers_block_type": ["mamba", "attention", "mlp", "mamba"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 4,
        },
    ),
    "olmo_hybrid": ("olmo_hybrid", DELTA | {"linear_num_key_heads": 4}),
    "qwen3_5": ("qwen3_5_text", DELTA),
    "qwen3_5_moe": ("qwen3_5_moe_text", EXPERTS | DELTA | {"shared_expert_intermediate_size": 16}),
}
# Models without a tree forward: name -> (model type, settings, part of the reason)
PLAIN = {
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}, "does not support custom attention implementations"),
    "falcon": ("falcon", {"head_dim": None}, "does not support custom attention implementations"),
    "gpt_neo": (
        "gpt_neo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4},
        "does not support custom attention implementations",
    ),
    "mamba": ("mamba", {"state_size": 4}, "does not support custom attention implementations"),
    "stablelm": ("stablelm", {}, "does not support custom attention implementations"),
    "nemotron": ("nemotron", {}, "does not pass forward keywords"),
    "recurrent_gemma": (
        "recurrent_gemma",
        {"logits_soft_cap": 3.0, "block_types": ["recurrent", "attention"]},
        "linear_attention",
    ),
    "minimax": (
        "minimax",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "block_size": 8,
        },
        "has linear_attention, which",
    ),
    "llama4": (
        "llama4_text",
        {"num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 4},
        "chunked_attention",
    ),
    "diffllama": ("diffllama", {}, "2 layers called tree attention 4 times"),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64}, "s_aux"),
    "mistral": ("mistral", {"sliding_window": 5}, "sliding window of 5"),
    "gemma2": ("gemma2", {"sliding_window": 5, "attn_logit_softcapping": 5.0}, "sliding window of 5"),
}
# Since transformers 5.24 its attention uses the interface
if Version(transformers.__version__) >= Version("5.24"):
    MORE_TREE["gptj"] = ("gptj", GPT | {"rotary_dim": 4})
else:
    PLAIN["gptj"] = ("gptj", GPT | {"rotary_dim": 4}, "does not support custom attention implementations")


def tiny_model(kind, settings=None, *, seed=0):
    """Return a model in fp32 with random weights, including biases and norms."""
    values = {name: value for name, value in (SMALL | (settings or {})).items() if value is not None}
    config = AutoConfig.for_model(kind, **values)
    config._experts_implementation = "eager"  # the grouped matrix product does not support fp64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for value in model.parameters():
            if value.dim() == 1:
                value.data += 0.2 * torch.randn_like(value)
    return model.eval()


def token_sequences(text):
    """Parse sequences from "prompt|response prompt|response"; each letter is a token."""
    found = []
    for each in text.split():
        prompt, _, response = each.partition("|")
        ids = np.array([3 + ord(letter) - ord("A") for letter in prompt + response], np.int32)
        found.append(TokenSequence(ids, np.arange(len(ids)) >= len(prompt)))
    return found


def random_sequences(seed, *, prompts, max_responses, alphabet=3):
    """Return groups of up to `max_responses` responses; with a small alphabet they share prefixes of any length."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(prompts):
        prompt = draw.integers(3, 3 + alphabet, draw.integers(1, 8))
        for _ in range(draw.integers(1, max_responses + 1)):
            response = draw.integers(3, 3 + alphabet, draw.integers(1, 9))
            ids = np.concatenate([prompt, response]).astype(np.int32)
            found.append(TokenSequence(ids, np.arange(len(ids)) >= len(prompt)))
    return found


SEQUENCES = {
    "one": token_sequences("ABCDE|FG"),
    "a pair": token_sequences("ABCDEFG|HIJKL ABCDEFG|MNO"),
    "one-token responses": token_sequences("ABCD|E ABCD|F ABCD|G"),
    "single-token prompts": token_sequences("A|BC A|DEF B|C"),
    "shared response prefixes": token_sequences("ABC|DEFGH ABC|DEFI ABC|DEFGJ ABC|DK"),
    "duplicates": token_sequences("ABC|DE ABC|DE ABC|DF ABC|DE"),
    "a prefix of another": token_sequences("ABC|D ABC|DEF ABC|DE"),
    "a response is another's prompt": token_sequences("AB|CDE ABCDE|FG ABC|X"),
    "a prompt that several groups share": token_sequences("ABCDE|FG ABCDE|HI ABCXY|FG ABCXY|ZZ ABC|M"),
    "nothing shared": token_sequences("ABC|DE FG|HIJ KLMN|O"),
    "13 responses": random_sequences(1, prompts=1, max_responses=13) + token_sequences("ABCDE|FG"),
    "many": random_sequences(2, prompts=5, max_responses=13),
}
assert len({len(each) for each in SEQUENCES.values()}) > 4


def stock_logps(model, sequences):
    """Return the log-probabilities of the targets from transformers' logits, one sequence at a time."""
    found = []
    for sequence in sequences:
        ids = torch.from_numpy(sequence.ids.astype(np.int64)).to(model.device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        exact = logits if logits.dtype == torch.float64 else logits.float()
        logps = exact.log_softmax(dim=-1)
        found += [logps[at - 1, ids[at]] for at in np.flatnonzero(sequence.loss_mask)]
    return torch.stack(found)


def eager_copy(model):
    """Return a copy of the model with eager attention."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin


def perturbed(adapted):
    """Return the model with random adapter weights; newly initialized adapters do not change the output."""
    generator = torch.Generator().manual_seed(0)
    for name, value in adapted.named_parameters():
        if "lora_" in name:
            value.data = 0.1 * torch.randn(value.shape, generator=generator)
    return adapted


def learned(policy, seed):
    """Return the policy as if trained: with random values of all trainable weights."""
    generator = torch.Generator().manual_seed(seed)
    for value in policy.parameters():
        if value.requires_grad:
            value.data = 0.1 * torch.randn(value.shape, generator=generator)
    return policy


def trained(policy):
    """Return the names of the trainable weights."""
    return {name for name, value in policy.named_parameters() if value.requires_grad}
