"""How even batch plans are over lengths as they occur, and what the plans of a large data set take.

Usage, from the root of the repository:

    python -m tests.benchmarks.planning [--groups N] [--per-rank N] [--budget N]

    --groups N      groups of the data set that is planned as a whole (10,000,000)
    --per-rank N    groups of an optimizer step for each rank (16)
    --budget N      tokens of a micro-batch (2048)

One process plans every step of an epoch: its order, and each step's micro-batches for all ranks. A rank of a run does
that too, one step at a time. Seconds are those of a core, for others may be using the machine. Sixteen groups a rank
are what long and unequal rows need to be dealt evenly. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from statistics import mean

import numpy as np

from align.data.balance import imbalance, min_imbalance
from align.data.batching import groups_of_step, order, plan_step, steps_per_epoch
from align.data.mixing import Mixture

# Tokens of a row's tree at these shares of the rows, by SmolLM2's tokenizer and its chat template
SHARES = (0, 0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1)
LENGTHS = {
    "UltraFeedback, pairs": (65, 101, 221, 321, 427, 548, 668, 801, 961, 1123, 1402, 2026, 2469),
    "OpenAssistant, groups of 2 to 9": (64, 105, 262, 348, 425, 483, 570, 690, 857, 1041, 1541, 2347, 2966),
    "Tulu's evaluation, pairs": (45, 60, 98, 152, 206, 279, 346, 416, 496, 601, 735, 1219, 4796),
    "GSM8K, demonstrations": (96, 114, 140, 157, 172, 187, 203, 221, 243, 267, 310, 425, 569),
    "Code Alpaca, demonstrations": (42, 48, 63, 73, 82, 92, 104, 117, 134, 155, 192, 354, 601),
}
RANKS = (8, 64, 512)
STEPS = 50  # of which the balance is measured


def drawn(name: str, number: int, *, seed: int = 0) -> np.ndarray:
    """Lengths of `number` rows with the quantiles of LENGTHS."""
    draw = np.random.default_rng([seed, number])
    return np.interp(draw.random(number), SHARES, LENGTHS[name]).astype(np.int32)


def balance(name: str, *, num_ranks: int, prompts_per_step: int, budget: int) -> dict[str, float]:
    """Mean and worst imbalance over STEPS steps, and what no plan could be below."""
    found, bounds = [], []
    for step in range(STEPS):
        sizes = drawn(name, prompts_per_step, seed=step)
        plan = plan_step(range(prompts_per_step), sizes, token_budget=budget, num_ranks=num_ranks)
        found.append(imbalance(plan, sizes))
        bounds.append(min_imbalance(range(prompts_per_step), sizes, num_ranks=num_ranks))
    return {"mean": mean(found), "worst": max(found), "bound_mean": mean(bounds), "bound_worst": max(bounds)}


def epoch(num_groups: int, *, num_ranks: int, per_rank: int, budget: int) -> dict[str, float]:
    """Seconds of a core for the order of an epoch and for the plans of all its steps."""
    sizes, per_step = drawn("UltraFeedback, pairs", num_groups), num_ranks * per_rank
    began = time.process_time()
    indices = order(num_groups, seed=0, epoch=0)
    ordered = time.process_time()
    for step in range(steps_per_epoch(num_groups, per_step)):
        groups = groups_of_step(step, num_groups, per_step, epoch_of=lambda _: indices)
        plan_step(groups, sizes, token_budget=budget, num_ranks=num_ranks)
    return {"ranks": num_ranks, "order_s": ordered - began, "plans_s": time.process_time() - ordered}


def mixed(num_groups: int) -> float:
    """Seconds of a core for the order of an epoch over three sources."""
    mixture = Mixture((num_groups // 2, num_groups // 3, num_groups // 6), (0.5, 0.3, 0.2), "all_exhausted")
    began = time.process_time()
    mixture.epoch(0)
    return time.process_time() - began


def peak_mib() -> int:
    """The most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    """Print the table and one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--groups", type=int, default=10_000_000)
    parser.add_argument("--per-rank", type=int, default=16)
    parser.add_argument("--budget", type=int, default=2048)
    asked = parser.parse_args()
    balances: dict[str, dict[str, dict[str, float]]] = {}
    for name in LENGTHS:
        for num_ranks, per_step in ((8, 128), (64, 128), *((ranks, ranks * asked.per_rank) for ranks in RANKS[1:])):
            found = balance(name, num_ranks=num_ranks, prompts_per_step=per_step, budget=asked.budget)
            balances.setdefault(name, {})[f"{num_ranks} ranks, {per_step} groups"] = found
            told = ", ".join(f"{key} {value:.3f}" for key, value in found.items())
            print(f"{name:<32} {num_ranks:>4} ranks {per_step:>5} groups: {told}", flush=True)
    epochs = [
        {"groups": number, **epoch(number, num_ranks=ranks, per_rank=asked.per_rank, budget=asked.budget)}
        for number in (asked.groups // 10, asked.groups)
        for ranks in RANKS
    ]
    for line in epochs:
        print(", ".join(f"{key} {value:,.1f}" for key, value in line.items()), flush=True)
    mixture_s = mixed(asked.groups)
    print(f"order of a mixture: {mixture_s:.1f} s; at most {peak_mib():,} MiB")
    print(json.dumps({"balance": balances, "epochs": epochs, "mixture_s": mixture_s, "peak_mib": peak_mib()}))


if __name__ == "__main__":
    main()
