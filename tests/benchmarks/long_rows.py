"""Peak memory of each process in SFT on one long row, which one process holds or several split.

Usage, from the root of the repository:

    MALLOC_MMAP_THRESHOLD_=1048576 python -m tests.benchmarks.long_rows
    MALLOC_MMAP_THRESHOLD_=1048576 accelerate launch --config_file launch/ddp-cpu-2.yaml \
        -m tests.benchmarks.long_rows --split 2

Each process prints a JSON line: its peak of resident memory above what it held before its model was made, the loss of
the last step, and the seconds of that step. See `tests.benchmarks.memory` on the variable.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from align.accounting.peak_memory import peak_memory
from align.data.token_groups import TokenGroup, TokenSequence
from align.train.sharding.accelerator import make_accelerator
from tests.train import tiny_training

STEPS = 2  # the first makes AdamW's moments
SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--split", type=int, default=1, help="train.sequence_parallel")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ids = np.random.default_rng(0).integers(tiny_training.VOCABULARY, size=options.tokens, dtype=np.int32)
    row = TokenGroup((TokenSequence(ids, np.arange(len(ids)) > 0),), None, None, ({},), 0)
    changes = {"sequence_parallel": options.split, "epochs": STEPS, "prompts_per_step": 1}
    accelerator = make_accelerator(tiny_training.settings(**changes))
    before = peak_memory(accelerator.device)
    with tempfile.TemporaryDirectory() as folder:
        policy = tiny_training.policy(**SIZES, num_key_value_heads=4, max_position_embeddings=options.tokens)
        objective = tiny_training.supervised()
        loop = tiny_training.loop(Path(folder), objective, [row], model=policy, accelerator=accelerator, **changes)
        last = loop.run().last_metrics
    peak = peak_memory(accelerator.device) - before
    print(json.dumps({"process": accelerator.process_index, "peak": peak, "loss": last["loss"], "s": last["seconds"]}))


if __name__ == "__main__":
    main()
