"""The peak of memory of a few training steps on the CPU, measured, beside what the formula says before they run.

Usage, from the root of the repository:

    python -m tests.benchmarks.memory [NAME …] [options]

    NAME                     cases of the table; all of them where left out
    --model MODEL            in place of the cases' own fresh models: a folder, hub id or gguf:FILE
    --tokens N               in place of the cases' own micro-batches
    --allocator              with glibc's own settings; see below

Each case runs in a process of its own with one thread and prints a JSON line: bytes that the steps took above what the
process held before its model was made, bytes by the formula and its parts, and the first over the second. The last
line is the largest share by which any of them is off.

glibc before 2.38 cannot put an aligned block, which is all that PyTorch asks for, into a hole of its own size (its bug
14581). What a small model lets go between tensors that it keeps then stays in memory, unused. Blocks of 32 MiB and
more are not affected, and below that none is that is at least as large as MALLOC_MMAP_THRESHOLD_ says, which the cases
are run with unless `--allocator` is given.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.accounting.flops import decoder_from_config
from align.accounting.memory import MicroBatch, adapter_weights, training_memory
from align.accounting.peak_memory import peak_memory
from align.data.token_groups import TokenGroup, TokenSequence
from align.models.adapters.attach import prepare_for_training
from align.models.lm_head.logprobs import TILE_CPU
from align.models.loading.pretrained import load_base, silence_transformers
from align.models.policy import Policy
from align.models.settings import LoraSettings, PolicySettings
from align.stages.costs.meter import reset_peak_memory
from tests.train import tiny_training

ROOT = Path(__file__).parents[2]
MAPPED = "1048576"  # bytes from which on a block has pages of its own and gives them back
STEPS = 2  # the first makes AdamW's moments
GROUPS = 4  # of a micro-batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model and how it is trained."""

    hidden: int = 512
    layers: int = 8
    intermediate: int = 1408
    heads: int = 8
    kv_heads: int = 4
    vocab: int = 65536
    tied: bool = True
    tokens: int = 512  # of a micro-batch
    micro_batches: int = 2  # of an optimizer step
    rank: int = 0  # of adapters
    checkpointing: bool = False
    precision: str = "fp32"
    weights: str = "fp32"
    responses: int = 1  # 1: supervised; more: a preference

    def policy(self, path: str | None) -> PolicySettings:
        """The policy's settings; a path takes the place of the fresh model."""
        fresh = {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 8192,
        }
        lora = LoraSettings(rank=self.rank) if self.rank else None
        source: dict[str, Any] = {"from_config": fresh} if path is None else {"path": path}
        return PolicySettings(**source, gradient_checkpointing=self.checkpointing, lora=lora)


CASES = {
    "full": Case(),
    "lora": Case(rank=16, tokens=2048, micro_batches=1, tied=False),
    "checkpointing": Case(checkpointing=True, tokens=1536, tied=False, vocab=32768),
    "lora checkpointing": Case(rank=16, checkpointing=True, tokens=2048, tied=False),
    "one micro-batch": Case(micro_batches=1),
    "untied": Case(tied=False, vocab=32768),
    "preference": Case(responses=2),
    "small vocabulary": Case(vocab=8192, tokens=2048),
    "deep": Case(layers=16, tokens=1024, vocab=16384),
    "wide": Case(hidden=1024, intermediate=2816, heads=16, vocab=16384, tokens=1024),
    "bf16": Case(precision="bf16", tokens=2048),
    "bf16 lora": Case(precision="bf16", rank=16, tokens=4096, micro_batches=1, tied=False),
    "bf16 master": Case(precision="bf16", weights="bf16_master", tokens=2048),
    "bf16 stochastic": Case(precision="bf16", weights="bf16_stochastic", tokens=2048),
    "bf16 stochastic lora": Case(precision="bf16", weights="bf16_stochastic", rank=16, tokens=4096, tied=False),
    "bf16 checkpointing": Case(precision="bf16", checkpointing=True, tokens=2048),
}


def main() -> None:
    """Measure the cases that are asked for, each in a child, and print them beside their estimates."""
    options = arguments().parse_args()
    if options.here:
        print(json.dumps(measure(CASES[options.names[0]], options)))
        return
    worst = 0.0
    for name in options.names or CASES:
        found = in_child(name, sys.argv[1:], allocator=options.allocator)
        worst = max(worst, abs(found["measured"] / found["estimated"] - 1))
        print(json.dumps({"case": name, **found, "measured/estimated": found["measured"] / found["estimated"]}))
    print(json.dumps({"largest_error": worst}))


def arguments() -> argparse.ArgumentParser:
    """The options of the usage above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*CASES, []], metavar="NAME")
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--allocator", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    return parser


def in_child(name: str, options: list[str], *, allocator: bool = False) -> dict[str, Any]:
    """What `measure` finds in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if allocator else {"MALLOC_MMAP_THRESHOLD_": MAPPED})
    passed = [each for each in options if each not in CASES]
    command = [sys.executable, "-m", "tests.benchmarks.memory", name, "--here", *passed]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Bytes that the case's steps have taken in this process, and those that the formula tells."""
    silence_transformers()
    torch.set_num_threads(1)
    before, settings = held(), case.policy(options.model)
    policy = Policy(prepare_for_training(load_base(settings), settings, task="CAUSAL_LM")).train()
    tokens = options.tokens or case.tokens
    vocab = int(policy.base.config.get_text_config().vocab_size)
    groups = list(make_groups(case, tokens, vocab))
    objective = tiny_training.supervised() if case.responses == 1 else tiny_training.preference("dpo")
    with tempfile.TemporaryDirectory() as folder:
        loop = tiny_training.loop(
            Path(folder),
            objective,
            groups,
            model=policy,
            prompts_per_step=len(groups),
            tokens_per_micro_batch=tokens,
            precision=case.precision,
            weights=case.weights,
            epochs=float(STEPS),
        )
        reset_peak_memory()
        for step in range(STEPS):
            loop.step(step)
    model = decoder_from_config(policy.base.config.to_dict())
    micro = MicroBatch(
        tokens=tokens,
        bf16=case.precision == "bf16",
        bf16_weights=case.weights != "fp32",
        checkpointing=case.checkpointing,
        only=case.micro_batches == 1,
    )
    trained = adapter_weights(model, case.rank) if case.rank else None
    master = case.weights == "bf16_master"
    parts = training_memory(model, micro, tile=TILE_CPU, trained=trained, master=master)
    measured = peak_memory(torch.device("cpu")) - before
    return {"measured": measured, "estimated": sum(parts), **parts._asdict()}


def make_groups(case: Case, tokens: int, vocab: int):
    """Groups of random tokens, of which so many fill the micro-batches of a step; a quarter is the prompt."""
    draw = np.random.default_rng(0)
    size = tokens // GROUPS
    for row in range(GROUPS * case.micro_batches):
        prompt = draw.integers(vocab, size=size // 4)
        length = (size - len(prompt)) // case.responses
        sequences = []
        for _ in range(case.responses):
            ids = np.concatenate([prompt, draw.integers(vocab, size=length)]).astype(np.int32)
            sequences.append(TokenSequence(ids, np.arange(len(ids)) >= len(prompt)))
        rewards = tuple(map(float, range(case.responses))) if case.responses > 1 else None
        yield TokenGroup(tuple(sequences), rewards, None, ({},) * case.responses, row)


def held() -> int:
    """Bytes that this process has in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
