"""Responses of `TransformersEngine`, of one `model.generate` call and of `generate_batch`, in turns: tokens a second.

Usage, from the root of the repository:

    python -m tests.benchmarks.sampling --model MODEL --data FILE [options]

    --model MODEL         folder, hub id or gguf:FILE
    --data FILE           prompts in any format that align reads, or tasks:general
    --prompts N           at once (48)
    --responses K         to each prompt (1)
    --min-prompt-length N prompts with fewer tokens are left out (1)
    --max-prompt-length N prompts with more tokens are left out (256)
    --new-tokens N        of every response at most (96)
    --end                 let the end of a turn end a response; otherwise each has all its tokens
    --temperature X       0: greedy (1)
    --top-p X             (1)
    --precision bf16|fp32 (bf16)
    --threads N           (2)
    --batch-size N        of align (prompts times K)
    --blocks N            times that each side answers all prompts (5)
    --paged               also transformers' continuous batching, `generate_batch`

All sides run the same weights in this process. `generate` gets all prompts, padded on the left, times K; the same
temperature and top-p. Tokens are counted up to the end of a turn. A rate is tokens per second of processor time of the
process, which depends little on what else the machine does; the seconds of a clock are in the JSON object of the last
line, where `ratio` is the ratio of ours to `generate`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from align.data.chat_encoder import ChatEncoder
from align.data.chat_templates import apply_template
from align.data.reading import read
from align.errors import InputError
from align.inference.settings import SamplingSettings
from align.inference.transformers_engine import DTYPES, TransformersEngine, cast_weights
from align.models.loading.pretrained import silence_transformers
from align.models.policy import load_policy
from align.models.settings import PolicySettings
from align.procedural import tasks
from align.records import Comparison, Prompt

LOOKED_AT = 2000  # rows, of which the first short enough are taken
PAGED_MEMORY = 0.1  # share of the memory that `generate_batch` takes for keys and values


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
    batch_size = options.batch_size or options.prompts * options.responses
    engine = TransformersEngine(model, tokenizer, name="policy", batch_size=batch_size)
    slot_attention = model.config._attn_implementation
    if not options.end:
        engine._end_tokens = set()
    prompts, ids = choose(options, tokenizer)
    settings = SamplingSettings(
        num_responses=options.responses,
        temperature=options.temperature,
        top_p=options.top_p,
        max_new_tokens=options.new_tokens,
        seed=0,
    )

    def align() -> int:
        model.set_attn_implementation(slot_attention)
        return sum(sample.num_tokens or 0 for sample in engine.sample(prompts, settings))

    def with_own_attention(run: Callable[..., int]) -> int:
        model.set_attn_implementation(own_attention)
        return run(model, ids, options, engine._end_tokens)

    sides: dict[str, Callable[[], int]] = {"generate": partial(with_own_attention, padded), "align": align}
    if options.paged:
        sides["generate_batch"] = partial(with_own_attention, paged)
    found: dict[str, list[Turn]] = {name: [] for name in sides}
    for block in range(options.blocks + 1):
        for name, run in sides.items():
            clock, processor = time.perf_counter(), time.process_time()
            tokens = run()
            turn = Turn(tokens, time.perf_counter() - clock, time.process_time() - processor)
            print(f"block {block}: {name} {tokens} tokens, {turn.rate:.1f} per processor second", flush=True)
            if block:  # the first one warms up
                found[name].append(turn)
    report(options, found, sum(map(len, ids)))


class Turn(NamedTuple):
    """One side's answers to all prompts."""

    tokens: int
    seconds: float  # of a clock
    processor_seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second of processor time."""
        return self.tokens / self.processor_seconds


def arguments() -> argparse.ArgumentParser:
    """The options of the usage above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--precision", choices=tuple(DTYPES), default="bf16")
    for name, number in {"temperature": 1.0, "top-p": 1.0}.items():
        parser.add_argument(f"--{name}", type=float, default=number)
    parser.add_argument("--end", action="store_true")
    parser.add_argument("--paged", action="store_true")
    numbers = {"prompts": 48, "responses": 1, "min-prompt-length": 1, "max-prompt-length": 256, "new-tokens": 96}
    for name, count in {**numbers, "threads": 2, "batch-size": 0, "blocks": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    return parser


def choose(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Prompt], list[list[int]]]:
    """The first prompts that are short enough, no two the same, with their tokens."""
    encoder = ChatEncoder(tokenizer)
    found: dict[tuple[int, ...], Prompt] = {}
    kind = options.data.removeprefix("tasks:")
    records: Iterable[Any] = (
        tasks.prompts(kind, num_rows=LOOKED_AT, seed=0, split="train")
        if kind != options.data
        else read(options.data, limit=LOOKED_AT, on_error="skip").records
    )
    for number, record in enumerate(records):
        messages = record.prompt if isinstance(record, Comparison) else record.messages
        while messages and messages[-1].role == "assistant":
            messages = messages[:-1]
        ids = tuple(encoder.prompt_ids(messages, number).tolist()) if messages else ()
        if options.min_prompt_length <= len(ids) <= options.max_prompt_length:
            found.setdefault(ids, Prompt(messages))
        if len(found) == options.prompts:
            break
    if len(found) < options.prompts:
        raise SystemExit(f"--prompts {options.prompts}: there are {len(found)} of at most {options.max_prompt_length}")
    return list(found.values()), [list(ids) for ids in found]


def padded(
    model: PreTrainedModel, ids: Sequence[Sequence[int]], options: argparse.Namespace, ends: Collection[int]
) -> int:
    """Answer by one call of `generate`; return the number of tokens."""
    longest = max(map(len, ids))
    run: Any = model.generate
    output = run(
        input_ids=torch.tensor([[0] * (longest - len(row)) + list(row) for row in ids]),
        attention_mask=torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids]),
        generation_config=generation(options, ends),
    )
    assert len(output) == len(ids) * options.responses
    return sum(length(row, ends) for row in output[:, longest:].tolist())


def paged(
    model: PreTrainedModel, ids: Sequence[Sequence[int]], options: argparse.Namespace, ends: Collection[int]
) -> int:
    """Answer by `generate_batch`; return the number of tokens."""
    run: Any = model.generate_batch
    outputs = run(
        [list(row) for row in ids],
        generation_config=generation(options, ends),
        continuous_batching_config=ContinuousBatchingConfig(max_memory_percent=PAGED_MEMORY),
    )
    assert len(outputs) == len(ids) * options.responses
    return sum(length(output.generated_tokens, ends) for output in outputs.values())


def generation(options: argparse.Namespace, ends: Collection[int]) -> GenerationConfig:
    """The same sampling in transformers' terms."""
    how: dict[str, Any] = {"do_sample": False}
    if options.temperature:
        how = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    end: Any = sorted(ends) or -1
    return GenerationConfig(
        max_new_tokens=options.new_tokens,
        num_return_sequences=options.responses,
        eos_token_id=end,
        pad_token_id=0,
        **how,
    )


def length(row: Sequence[int], ends: Collection[int]) -> int:
    """Number of tokens up to the end of the turn, with it."""
    return next((number for number, token in enumerate(row, 1) if token in ends), len(row))


def report(options: argparse.Namespace, found: dict[str, list[Turn]], prompt_tokens: int) -> None:
    """Print the figures; the last line is one JSON object."""
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "transformers")))
    print(f"{options.prompts} prompts of {prompt_tokens} tokens, {options.responses} responses to each")
    figures: dict[str, Any] = {}
    for name, turns in found.items():
        rates = [turn.rate for turn in turns]
        print(f"{name}: median {statistics.median(rates):.1f}, min {min(rates):.1f}, max {max(rates):.1f} tokens/s")
        figures[name] = [turn._asdict() for turn in turns]
        if name != "align":
            ratios = [ours.rate / theirs.rate for ours, theirs in zip(found["align"], turns, strict=True)]
            ours, theirs = (
                sum(turn.tokens for turn in each) / sum(turn.processor_seconds for turn in each)
                for each in (found["align"], turns)
            )
            values = {
                "sums": ours / theirs,
                "median": statistics.median(ratios),
                "min": min(ratios),
                "max": max(ratios),
            }
            print(f"align to {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in values.items()))
            figures["ratio" if name == "generate" else f"ratio_{name}"] = values
    print(json.dumps({**figures, **vars(options)}))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"sampling: {error}") from error
