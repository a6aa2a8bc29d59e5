"""Responses of `TransformersEngine` and of a bare `model.generate` to the same prompts, in turns: tokens a second.

Usage, from the root of the repository:

    python -m tests.benchmarks.sampling --model MODEL --data FILE [options]

    --model MODEL         folder, hub id or gguf:FILE
    --data FILE           prompts in any format that align reads
    --prompts N           at once (48)
    --max-prompt-length N prompts with more tokens are left out (256)
    --new-tokens N        of every response: no token ends one (96)
    --temperature X       0: greedy (1)
    --top-p X             (1)
    --precision bf16|fp32 (bf16)
    --threads N           (2)
    --blocks N            times that each side answers all prompts (5)

Both sides run the same weights in this process. The bare side is one call of `generate` on all prompts, padded on the
left, with the same temperature and top-p. The last line is one JSON object; `ratio` is ours over theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.data.chat_encoder import ChatEncoder
from align.data.chat_templates import apply_template
from align.data.reading import read
from align.errors import InputError
from align.inference.settings import SamplingSettings
from align.inference.transformers_engine import DTYPES, TransformersEngine, cast_weights
from align.models.loading.pretrained import silence_transformers
from align.models.policy import load_policy
from align.models.settings import PolicySettings
from align.records import Comparison, Prompt

LOOKED_AT = 2000  # rows, of which the first short enough are taken


def main() -> None:
    """Measure and report."""
    options = arguments().parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(options.threads)
    silence_transformers()
    policy, tokenizer = load_policy(PolicySettings(path=options.model))
    if not tokenizer.chat_template:
        apply_template(tokenizer, "chatml")
    model = cast_weights(policy.base, DTYPES[options.precision])
    own_attention = model.config._attn_implementation
    engine = TransformersEngine(model, tokenizer, name="policy", batch_size=options.prompts)
    slot_attention = model.config._attn_implementation
    engine._ends = set()  # every response has the same number of tokens on both sides
    prompts, ids = choose(options, tokenizer)
    settings = SamplingSettings(
        temperature=options.temperature, top_p=options.top_p, max_new_tokens=options.new_tokens, seed=0
    )
    rates: dict[str, list[float]] = {"generate": [], "align": []}
    for block in range(options.blocks + 1):
        model.set_attn_implementation(own_attention)
        theirs = bare(model, ids, options)
        model.set_attn_implementation(slot_attention)
        start = time.perf_counter()
        tokens = sum(sample.num_tokens or 0 for sample in engine.sample(prompts, settings))
        ours = tokens / (time.perf_counter() - start)
        assert tokens == options.prompts * options.new_tokens
        print(f"block {block}: generate {theirs:.1f} tokens/s, align {ours:.1f}", flush=True)
        if block:  # the first one warms up
            rates["generate"].append(theirs)
            rates["align"].append(ours)
    report(options, rates, sum(map(len, ids)))


def arguments() -> argparse.ArgumentParser:
    """The options of the usage above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--precision", choices=tuple(DTYPES), default="bf16")
    for name, number in {"temperature": 1.0, "top-p": 1.0}.items():
        parser.add_argument(f"--{name}", type=float, default=number)
    numbers = {"prompts": 48, "max-prompt-length": 256, "new-tokens": 96, "threads": 2, "blocks": 5}
    for name, count in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    return parser


def choose(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Prompt], list[list[int]]]:
    """The first prompts that are short enough, no two the same, with their tokens."""
    encoder = ChatEncoder(tokenizer)
    found: dict[tuple[int, ...], Prompt] = {}
    for number, record in enumerate(read(options.data, limit=LOOKED_AT, on_error="skip").records):
        messages = record.prompt if isinstance(record, Comparison) else record.messages
        while messages and messages[-1].role == "assistant":
            messages = messages[:-1]
        ids = tuple(encoder.prompt_ids(messages, number).tolist()) if messages else ()
        if 0 < len(ids) <= options.max_prompt_length:
            found.setdefault(ids, Prompt(messages))
        if len(found) == options.prompts:
            break
    if len(found) < options.prompts:
        raise SystemExit(f"--prompts {options.prompts}: there are {len(found)} of at most {options.max_prompt_length}")
    return list(found.values()), [list(ids) for ids in found]


def bare(model: PreTrainedModel, ids: Sequence[Sequence[int]], options: argparse.Namespace) -> float:
    """Tokens a second of one call of `generate`."""
    longest = max(map(len, ids))
    inputs = torch.tensor([[0] * (longest - len(row)) + list(row) for row in ids])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    how: dict[str, Any] = {"do_sample": False}
    if options.temperature:
        how = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    num_tokens = options.new_tokens
    run: Any = model.generate
    start = time.perf_counter()
    output = run(
        input_ids=inputs,
        attention_mask=mask,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        pad_token_id=0,
        **how,
    )
    assert output.shape == (len(ids), longest + num_tokens)
    return len(ids) * num_tokens / (time.perf_counter() - start)


def report(options: argparse.Namespace, rates: dict[str, list[float]], prompt_tokens: int) -> None:
    """Print the figures; the last line is one JSON object."""
    ratios = [ours / theirs for ours, theirs in zip(rates["align"], rates["generate"], strict=True)]
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "transformers")))
    print(f"{options.prompts} prompts of {prompt_tokens} tokens, {options.new_tokens} new tokens each")
    for name, found in rates.items():
        print(f"{name:8} tokens/s: median {statistics.median(found):.1f}, min {min(found):.1f}, max {max(found):.1f}")
    print(f"ratio: median {statistics.median(ratios):.3f}, min {min(ratios):.3f}, max {max(ratios):.3f}")
    figures = {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    print(json.dumps({**figures, **{f"tokens_per_s_{name}": found for name, found in rates.items()}, **vars(options)}))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"sampling: {error}") from error
