"""CPU time of the tree and of the padded forward and backward pass on random hybrid models.

`python -m tests.benchmarks.recurrent` prints a line for each model and shape of a group: prompt, responses, tokens of a
response. The two forwards run in turns; the medians are compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align.data.token_groups import TokenSequence
from align.models.policy import Policy
from align.models.tree.batch import TokenBatch, plain_batch, tree_batch

VOCABULARY = 4096
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
DELTA = {f"linear_{part}_head_dim": 64 for part in ("key", "value")} | {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "lfm2": {"layer_types": ["conv"] * 3 + ["full_attention"]},
    "bamba": {"attn_layer_indices": [3], "mamba_n_heads": 8, "mamba_d_state": 64, "mamba_chunk_size": 64},
    "qwen3_5_text": {"head_dim": 64, "layer_types": ["linear_attention"] * 3 + ["full_attention"], **DELTA},
}
SHAPES = [(256, 2, 64), (256, 4, 64), (512, 4, 32)]
FORWARDS: dict[Literal["plain", "tree"], Callable[[list[TokenSequence]], TokenBatch]] = {
    "plain": plain_batch,
    "tree": tree_batch,
}


def group(prompt: int, responses: int, length: int) -> list[TokenSequence]:
    draw = np.random.default_rng(0)
    shared, mask = draw.integers(3, VOCABULARY, prompt), np.arange(prompt + length) >= prompt
    own = [draw.integers(3, VOCABULARY, length) for _ in range(responses)]
    return [TokenSequence(np.concatenate([shared, each]).astype(np.int32), mask) for each in own]


def main() -> None:
    torch.set_num_threads(1)
    for kind, settings in MODELS.items():
        torch.manual_seed(0)
        policy = Policy(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | settings)))).train()
        for shape in SHAPES:
            seconds: dict[str, list[float]] = {"plain": [], "tree": []}
            tokens: dict[str, int] = {}
            for name in ["plain", "tree"] * 6:
                policy.use_forward(name)
                batch = FORWARDS[name](group(*shape))
                tokens[name], start = batch.num_tokens, time.process_time()
                policy(batch).sum().backward()
                seconds[name].append(time.process_time() - start)
            padded, tree = (median(seconds[name][1:]) for name in ("plain", "tree"))  # without the first pass
            counts = f"tokens {tokens['plain']} padded, {tokens['tree']} tree"
            print(f"{kind} {shape}: {counts}; {padded:.2f} s, {tree:.2f} s, {padded / tree:.2f} times", flush=True)


if __name__ == "__main__":
    main()
