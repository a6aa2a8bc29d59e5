"""Bytes that a node sends in a training step, counted where they leave it, beside what the formula says.

Usage, from the root of the repository:

    python -m tests.benchmarks.wire [options]

    --ways WAY ...       ddp, zero1, zero2, zero3: gradients are reduced `once` a step, and in `each` micro-batch (all)
    --forward FORWARD    tree or plain (tree)
    --steps N            optimizer steps that are counted, after one that is not (4)
    --micro-batches N    of each process in a step (3)
    --hidden N           of a random Llama with three layers and 2048 tokens; 256 make 4 million weights (256)
    --tied               its head is its embedding
    --bf16               precision bf16, in which ZeRO-3 gathers what autocast rounds in bf16
    --reduce-bf16        gradients are reduced in bf16
    --checkpointing      layers run once more in the backward pass
    --evaluations        after each step as many held-out micro-batches are looked at

Each of two nodes is a network namespace with a process of its own. They train over gloo on the CPU, through a pair of
veth devices. The last line is one JSON object: for each way and node what was counted, with the headers of packets,
and what the formula says.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from align.accounting.communication import BF16, FP32, Sharding, Traffic, communication_bytes
from align.data.token_groups import TokenGroup

sys.path.append(str(Path(__file__).parents[1] / "train"))  # where modules of tests find each other
from launching import told
from tiny_training import Recorder, group, loop, policy, supervised
from two_nodes import Wire, run_on_both, sent, why_no_wire

STAGES = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3}
KEPT_WHOLE = 100_000  # numbers in the largest tensor that ZeRO-3 does not cut: `stage3_param_persistence_threshold`
PROMPT, RESPONSE, VOCABULARY = 8, 24, 2048  # tokens of each sequence, which is a micro-batch
NODE = "--node"  # what a process that trains is told


def main() -> None:
    """Count every way that is asked for and print what was found."""
    options = arguments().parse_args()
    if options.node:
        for reduce in ("once", "each"):
            train(options, reduce)
        os._exit(0)  # torch with gloo aborts at random while the interpreter comes down
    reason = why_no_wire()
    if reason:
        raise SystemExit(reason)
    print("bytes a step         node       counted       formula   ratio")
    found: list[dict[str, Any]] = []
    for way in options.ways:
        for line in compare(options, way):
            numbers = f"{line['counted']:14,.0f}{line['formula']:14,.0f}{line['counted'] / line['formula']:8.3f}"
            print(f"{way:6} {line['reduce']:14}{line['node']:4}{numbers}", flush=True)
            found.append(line)
    print(json.dumps(found))


def arguments() -> argparse.ArgumentParser:
    """The options of the usage above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--forward", choices=("tree", "plain"), default="tree")
    for name, default in {"steps": 4, "micro-batches": 3, "hidden": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("tied", "checkpointing", "evaluations", "bf16", "reduce-bf16"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument(NODE, action="store_true", help=argparse.SUPPRESS)
    return parser


def compare(options: argparse.Namespace, way: str) -> Iterator[dict[str, Any]]:
    """For each node what it has sent in a step, and what the formula says that it sends."""
    with Wire() as nodes:
        outputs = run_on_both(nodes, f"{way}-cpu-2.yaml", "-m", "tests.benchmarks.wire", NODE, *sys.argv[1:])
    micro_batches = options.steps * options.micro_batches
    for line in (line for output in outputs for line in told(output)):
        traffic = Traffic(
            weights=line["weights"],
            unpartitioned=line["small"],
            steps=options.steps,
            micro_batches=micro_batches,
            regathered=micro_batches,
            forward_only=micro_batches if options.evaluations else 0,
            reduced_bytes=BF16 if options.reduce_bf16 else FP32,
            gathered_in_bf16=line["rounded"],
        )
        ways = Sharding(stage=STAGES[way], processes=2, reduce=line["reduce"])
        yield {"way": way, **line, "formula": communication_bytes(ways, traffic) / options.steps}


def train(options: argparse.Namespace, reduce: str) -> None:
    """Print what this node has sent in a step."""
    torch.set_num_threads(1)
    in_step, meter = 2 * options.micro_batches, Meter()
    model = policy(
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=3,
        vocab_size=VOCABULARY,
        tie_word_embeddings=options.tied,
    )
    if options.checkpointing:
        model.base.gradient_checkpointing_enable({"use_reentrant": False})
    sizes = [value.numel() for value in model.parameters()]
    changes: dict[str, Any] = {"reduce": reduce, "prompts_per_step": in_step}
    changes |= {"tokens_per_micro_batch": PROMPT + RESPONSE, "evaluate_every": 1 if options.evaluations else None}
    changes |= {"precision": "bf16"} if options.bf16 else {}
    changes |= {"reduce_dtype": "bf16"} if options.reduce_bf16 else {}
    held_out = rows(in_step) if options.evaluations else []
    made = loop(
        Path(tempfile.mkdtemp()),
        supervised(),
        rows((options.steps + 1) * in_step),
        model=model,
        progress=meter,
        job={"held_out": held_out, "forward": options.forward},
        **changes,
    )
    made.run()
    line = {"reduce": reduce, "node": made.accelerator.process_index, "weights": sum(sizes)}
    line |= {"rounded": made.sharding.num_rounded}
    line |= {"small": sum(size for size in sizes if size <= KEPT_WHOLE)}
    print(json.dumps(line | {"counted": (meter.sent[-1] - meter.sent[0]) / options.steps}), flush=True)
    made.accelerator.free_memory()


class Meter(Recorder):
    """A reporter that reads after each step what has left this node."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[int] = []

    def advance(self, units: int, metrics: dict[str, float] | None = None) -> None:
        """A step is done."""
        if metrics is not None:
            self.sent.append(sent())


def rows(number: int) -> list[TokenGroup]:
    """Demonstrations, each as long as a micro-batch may be."""
    draw = random.Random(0)
    tokens = [[draw.randrange(VOCABULARY) for _ in range(PROMPT + RESPONSE)] for _ in range(number)]
    return [group(each[:PROMPT], [each[PROMPT:]], row=row) for row, each in enumerate(tokens)]


if __name__ == "__main__":
    main()
